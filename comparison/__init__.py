"""A table of models that are trained, distilled, compressed and scored by this project: `sharebert compare`.

recipe   what is compared: the rows, the tasks, the published figures, the trainings that are only planned
rows     the rows, checked: what each is made of, and what it needs of the rows before it
checks   what cannot work, said before the first row
lines    what the table says about a row
pieces   the pieces of rows: where each lies, what it is made from, and which are there; nothing is written
maker    makes them
run      makes all rows, one piece after the other; goes on after a kill
times    the times of all models, taken in turns
table    the table, computed from the files of the pieces alone
text     the table as Markdown
"""
