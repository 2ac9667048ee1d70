"""Steps from export to export that make a model smaller: `sharebert compress`.

run           the command: steps one after the other, a report after each
recipe        its keys
step          the protocol of a step, and what it is given
steps         all steps by name
source        which form of a model a folder holds
step_folders  the results of steps, kept so that a killed command goes on
tools         what the frame gives to a step; the masked-language-model loss of any form
measure       what a report says about one model
as_is         the score of a classifier as it is
static        the reference of a vector for each word
saved_state   what a long step saves, so that it goes on after it was killed
calibrate     the forward pass on calibration rows, with masks on parts
encoder_loss  such rows of an encoder of Hugging Face, and what it is trained on
training      the loop of steps that train on calibration rows
latency       time and memory of a model, in a process of its own
shape_times   times of several shapes side by side
report        the report as a table, JSON, a picture and curves, and its check
quantise      the step that stores the factors in a few bits a number
distil        the step that trains a model further with a teacher
trim          the step that leaves out parameters that change no output
prune         steps that remove heads, columns and layers, or set weights to zero
low_rank      steps that replace matrices by products of smaller ones
dense         steps for models whose matrices are written out: ONNX, and int8 products
"""
