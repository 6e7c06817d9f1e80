"""Results made anew on the meta device: the tensors that torch returns, and bytes shared where it shares them."""

import pytest
import torch

from trsd.meta_results import MetaResults, tensors_in


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


class Counted:
    """A function that says how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def forms(result):
    return [
        (x.dtype, x.shape, x.stride(), x.storage_offset(), x.untyped_storage().nbytes()) for x in tensors_in(result)
    ]


OPERATIONS = {
    "product": (torch.ops.aten.mm.default, lambda: (meta(3, 5), meta(5, 2)), {}),
    "product of a transpose": (torch.ops.aten.mm.default, lambda: (meta(3, 5), meta(2, 5).T), {}),
    "elementwise, keeps strides": (torch.ops.aten.exp.default, lambda: (meta(3, 5).T,), {}),
    "promotion": (torch.ops.aten.add.Tensor, lambda: (meta(3, dtype=torch.bfloat16), meta(4, 3)), {}),
    "cast": (torch.ops.aten._to_copy.default, lambda: (meta(3, 5),), {"dtype": torch.bfloat16}),
    "several": (torch.ops.aten.topk.default, lambda: (meta(3, 5), 2), {}),
    "list": (torch.ops.aten._foreach_mul.Scalar, lambda: ([meta(3), meta(4)], 2.0), {}),
    "sum": (torch.ops.aten.sum.dim_IntList, lambda: (meta(3, 5), [1], True), {}),
    "random": (torch.ops.aten.native_dropout.default, lambda: (meta(3, 5), 0.1, True), {}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_made_anew_is_what_torch_returns(name):
    operation, given, options = OPERATIONS[name]
    counted, results = Counted(operation), MetaResults()
    want = operation(*given(), **options)
    for _ in range(3):
        got = results(counted, given(), options)
        assert type(got) is type(want) and forms(got) == forms(want)
    assert counted.calls == 1


def test_another_shape_stride_dtype_or_number_is_asked_anew():
    counted, results = Counted(torch.ops.aten.sum.dim_IntList), MetaResults()
    asked = [
        (meta(3, 5), [1], True),
        (meta(5, 3), [1], True),
        (meta(5, 3).T, [1], True),
        (meta(3, 5, dtype=torch.float64), [1], True),
        (meta(3, 5), [0], True),
        (meta(3, 5), [1], False),
    ]
    for number, args in enumerate(asked, 1):
        assert forms(results(counted, args, {})) == forms(torch.ops.aten.sum.dim_IntList(*args))
        assert counted.calls == number
    added = Counted(torch.ops.aten.add.Scalar)
    whole, real = (results(added, (meta(3, dtype=torch.int64), number), {}) for number in (1, 1.0))
    assert (whole.dtype, real.dtype) == (torch.int64, torch.float32)


def test_two_results_have_storages_of_their_own():
    results = MetaResults()
    one, two = (results(torch.ops.aten.exp.default, (meta(3),), {}) for _ in range(2))
    assert one.untyped_storage()._cdata != two.untyped_storage()._cdata


RUN = {
    torch.ops.aten.add_.Tensor: lambda: (meta(3), meta(3)),
    torch.ops.aten.view.default: lambda: (meta(3, 4), [12]),
    torch.ops.aten._unsafe_view.default: lambda: (meta(3, 4), [12]),
    torch.ops.aten._foreach_add_.Scalar: lambda: ([meta(3)], 1.0),
    torch.ops.aten.split.Tensor: lambda: (meta(4), 2),
}


@pytest.mark.parametrize("operation", RUN, ids=str)
def test_what_writes_or_shares_bytes_is_run(operation):
    counted, results = Counted(operation), MetaResults()
    for number in range(1, 4):
        results(counted, RUN[operation](), {})
        assert counted.calls == number


def test_tensors_with_content_are_computed():
    steps, results = torch.zeros(()), MetaResults()
    for _ in range(3):
        results(torch.ops.aten._foreach_add_.Scalar, ([steps], 1.0), {})
        steps.copy_(results(torch.ops.aten.mul.Tensor, (steps, torch.ones(())), {}))
    assert steps == 3
    drawn = [results(torch.ops.aten.rand.default, ([],), {}) for _ in range(2)]
    assert drawn[0] != drawn[1]


def function(x, y, factor):
    """New tensors, views, numbers and content, as compiled graphs return them."""
    return x * factor, x[1:].view(-1), y.t(), x.shape[0], factor * 2, y


def test_a_pure_functions_views_are_views_of_what_it_is_given_now():
    counted, results = Counted(function), MetaResults(pure=True)
    for _ in range(3):
        whole = meta(6, 4)
        args = whole[2:], meta(2, 3), torch.tensor(0.5)
        got, want = results(counted, args, {}), function(*args)
        assert forms(got) == forms(want) and got[3] == 4 and got[4] == 1
        shared = [x.untyped_storage()._cdata for x in (got[1], got[2], got[5])]
        assert shared == [x.untyped_storage()._cdata for x in (whole, args[1], args[1])]
    assert counted.calls == 1
    got = results(counted, (meta(4, 4), meta(2, 3), torch.tensor(0.25)), {})
    assert counted.calls == 2 and got[4] == 0.5


def test_views_follow_which_arguments_share_bytes():
    """Two views of one tensor are told from two tensors, and from two other views of it."""
    results = MetaResults(pure=True)

    def last_of(x, y):
        return [y[1:]]

    whole = meta(8)
    for x, y in ((whole[:4], whole[4:]), (whole[:4], whole[2:6]), (meta(4), meta(4)), (whole[:4], whole[4:])):
        (got,) = results(last_of, (x, y), {})
        assert got.untyped_storage()._cdata == y.untyped_storage()._cdata
        assert forms(got) == forms(y[1:])


@pytest.mark.parametrize("parts", [lambda x: (x, x.view(2, 2)), lambda x: x[:2]], ids=["twice", "a part"])
def test_of_a_pure_function_what_shares_bytes_of_its_own_is_run(parts):
    counted, results = Counted(lambda x: parts(x + 1)), MetaResults(pure=True)
    for number in range(1, 3):
        storages = [x.untyped_storage() for x in tensors_in(results(counted, (meta(4),), {}))]
        assert len({storage._cdata for storage in storages}) == 1 and storages[0].nbytes() == 16
        assert counted.calls == number
