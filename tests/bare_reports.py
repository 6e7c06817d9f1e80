"""Runs of tests that say nothing of reports: pictures are empty files, and memory by part is not counted.

Both together took two fifths of a small run. Fixture ``whole_report`` has them; so have all runs as users start them.
"""

from trsd import plots, training


def leave_out(setattr_=setattr):
    """Leave them out from now on; ``setattr_`` may be monkeypatch's."""
    setattr_(plots, "_save", _empty_file)
    setattr_(training, "memory_parts", lambda recipe, method, device: {})


def _empty_file(figure, path):
    import matplotlib.pyplot as plt

    path.write_bytes(b"")
    plt.close(figure)
