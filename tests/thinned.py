"""Which cases of a test run where each one is slow: a part of them in which every value of every parameter occurs."""

import random
from collections import defaultdict
from fractions import Fraction

PART = Fraction(1, 4)


def left_out(items):
    """Those of pytest's ``items`` that may be left out: of each test's cases all but ``PART``, rounded up.

    The choice hangs on the test's name alone. A test whose values cannot occur in so few cases keeps more of them.
    """
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        random.Random(name).shuffle(cases)
        seen, spare = set(), []
        for case in cases:
            values = _values(case)
            if values <= seen:
                spare.append(case)
            seen |= values
        yield from spare[max(0, -(-len(cases) * PART.numerator // PART.denominator) - (len(cases) - len(spare))) :]


def _values(item):
    """(parameter, its value as text) of a case; the one case of a test without parameters has a value of its own."""
    callspec = getattr(item, "callspec", None)
    return {(name, repr(value)) for name, value in callspec.params.items()} if callspec else {("", "")}
