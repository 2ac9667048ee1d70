"""The step `quantise`: the factors E and W_all in a few bits a number, in a file that is really small.

step        the step and its keys
rounding    numbers → codes and scales: with a search for the clip, or with GPTQ; to the nearest: exports/rounding.py
awq         factors of columns, from calibration rows
hessians    how much an error of each factor costs, in closed form
"""
