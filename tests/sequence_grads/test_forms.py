"""Forms of sequence gradients in half precision, on what passes for a GPU, against float64."""

import pytest
import torch
from support.accelerator import accelerating

from proma_trl.sequence_grads.experts import ExpertGrads
from proma_trl.sequence_grads.forms import Dense, OuterProducts, Rows, SegmentProducts, Segments, weighted_sum

K, ROWS, COLUMNS = 3, 7, 5
COUNTS = [4, 0, 6]
COEFFICIENTS = torch.tensor([0.3, -1.7, 0.9])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _accelerating():
    with accelerating():
        yield


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def outer_products(dtype):
    left, right = randn(K, 11, ROWS, dtype=dtype), randn(K, 11, COLUMNS, dtype=dtype)
    return OuterProducts(left, right), left.double().mT @ right.double()


def wide_outer_products(dtype):
    """The weights of a sum go on the narrower factor."""
    left, right = randn(K, 11, ROWS, dtype=dtype), randn(K, 11, 2 * ROWS, dtype=dtype)
    return OuterProducts(left, right), left.double().mT @ right.double()


def segment_products(dtype):
    left, right = randn(10, ROWS, dtype=dtype), randn(10, COLUMNS, dtype=dtype)
    segments = Segments(COUNTS, torch.arange(K).repeat_interleave(torch.tensor(COUNTS)))
    parts = zip(left.double().split(COUNTS), right.double().split(COUNTS), strict=True)
    return SegmentProducts(left, right, segments), torch.stack([a.mT @ b for a, b in parts])


def dense(dtype):
    grads = randn(K, ROWS, COLUMNS, dtype=dtype)
    return Dense(grads), grads.double()


def close(found, want, dtype):
    """Up to the rounding of the result, and of coefficients."""
    return (found.double() - want).norm() <= 4 * torch.finfo(dtype).eps * max(1, want.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [outer_products, wide_outer_products, segment_products, dense])
def test_products(make, dtype):
    grads, want = make(dtype)
    held = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert grads.dtype == held
    out = torch.full((K, 4, want.shape[-1]), 7.0, dtype=held)
    grads.write_rows(out, 2, 6)
    assert close(out, want[:, 2:6], held)
    grads.add_rows(out, 1, 5)
    assert close(out, want[:, 2:6] + want[:, 1:5], held)
    for coefficients in (None, COEFFICIENTS):
        weights = torch.ones(K) if coefficients is None else coefficients
        total = torch.einsum("k,kij->ij", weights.double(), want)
        found = grads.combine(coefficients)
        assert found.dtype == torch.float32 and close(found, total, dtype)
        grads.add_combined(found, coefficients)
        assert close(found, 2 * total, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sum(dtype):
    vectors = randn(K, 40, dtype=dtype)
    found = weighted_sum(COEFFICIENTS, vectors)
    assert found.dtype == torch.float32 and close(found, COEFFICIENTS.double() @ vectors.double(), dtype)


def test_a_token_that_occurs_often_is_rounded_once():
    """Added one by one in bfloat16, 600 small numbers would be lost beside their sum."""
    indices = torch.tensor([[3] * 600, [1] * 300 + [5] * 300])
    values = torch.full((2, 600, 2), 2.0**-8)
    out = torch.zeros(2, 6, 2, dtype=torch.bfloat16)
    Rows(indices, values, 6).add_rows(out, 0, 6)
    want = torch.zeros(2, 6, 2)
    want[0, 3], want[1, 1], want[1, 5] = 600 / 256, 300 / 256, 300 / 256
    assert torch.equal(out, want.bfloat16())
    part = torch.zeros(2, 2, 2, dtype=torch.bfloat16)
    Rows(indices, values, 6).add_rows(part, 4, 6)
    assert torch.equal(part, want[:, 4:6].bfloat16())


def test_compact_rows_do_not_wait():
    grads = Rows(torch.tensor([[4, 2, 4], [9, 2, 0]]), randn(2, 3, COLUMNS), 12)
    compact, places = grads.compact()
    assert len(places) == 6 and places[:4].tolist() == [0, 2, 4, 9]
    out, want = torch.empty(2, 6, COLUMNS), torch.empty(2, 12, COLUMNS)
    compact.write_rows(out, 0, 6)
    grads.write_rows(want, 0, 12)
    assert torch.equal(out[:, :4], want[:, [0, 2, 4, 9]]) and not out[:, 4:].any()


def test_experts_fill_up():
    """Many small products are one large one."""
    counts = torch.tensor([[2, 0, 1], [0, 0, 0], [3, 1, 2]])
    left, right = randn(9, ROWS), randn(9, COLUMNS)
    parts = zip(left.split(counts.flatten().tolist()), right.split(counts.flatten().tolist()), strict=True)
    want = torch.stack([a.mT @ b for a, b in parts]).view(3, 3, ROWS, COLUMNS).transpose(0, 1)
    grads = ExpertGrads(left, right, counts)
    out = torch.empty(3, 2, ROWS, COLUMNS)
    grads.write_rows(out, 1, 3)
    assert torch.allclose(out, want[:, 1:3], atol=1e-5)
    grads.add_rows(out, 0, 2)
    assert torch.allclose(out, want[:, 1:3] + want[:, 0:2], atol=1e-5)
