"""`lightning-indexer demo`: real text in, a paged FP4 cache, a selection that is checked, a report and a picture.

options.py    what the command line asks
device.py     CPU or GPU
text.py       paragraphs -> tokens, with the planted sentences spliced in
passages.py   what is planted, and what is asked
model.py      stand-in hidden states, and weights under which a score means similarity
layer.py      a CSA layer with these weights: write the cache, ask, select, attend
findings.py   sizes, ranks and texts of a finished selection
run.py        all of it in order
report.py     what a run found; screen.py prints it, picture.py draws it
"""
