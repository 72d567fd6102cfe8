"""The engine of a decoupled step. It knows no network class: it is handed stages, synthesizers,
optimizers and the name of whoever calls.

To read it: `trainer.py` (a step: repeat, prepare, run), `parts.py` (what runs), then whatever they
ask: `structure.py`, `stages.py` (which stages a sweep runs), `optimizers.py`, `arguments.py`,
`watch.py` (what has changed since the last step), `boundary.py` (predict now, regress later).
"""
