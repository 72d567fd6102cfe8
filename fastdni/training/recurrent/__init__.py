"""Windows of a recurrent network, each cut off from the next one by a boundary at its state.

To read it: `layouts.py` (how a state lies before its synthesizers), `unroll.py` (who runs a
window), `window.py` (from its forward pass to its synthesizers' regression), `traces.py`
(targets that look further than the next boundary), `horizon.py` (the auxiliary task).
"""
