"""Options: what they refuse, and that their text form loses nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trsd_kernels import DistillOptions
from trsd_kernels.options import DIVERGENCES

shares = st.floats(0, 1, exclude_max=True)
positive = st.floats(1e-300, 1e300)


@given(
    st.builds(
        DistillOptions,
        alpha=st.one_of(shares, st.sampled_from([0, 1])),
        divergence=st.sampled_from(DIVERGENCES),
        beta=shares,
        skew=shares,
        temperature=positive,
        temperature_squared=st.sampled_from([True, False, 0, 1]),
        student_logit_scale=st.floats(allow_nan=False, allow_infinity=False),
        teacher_logit_softcap=st.one_of(st.none(), positive, st.integers(1, 99)),
        ignore_index=st.integers(-(2**63), 2**63 - 1),
    )
)
def test_the_text_form_gives_the_options_back(options):
    assert DistillOptions.decode(options.encode()) == options


@pytest.mark.parametrize("number", ["half", None])
def test_what_is_no_number_is_refused(number):
    with pytest.raises((TypeError, ValueError)):
        DistillOptions(alpha=number)
