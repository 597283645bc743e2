"""Subspaces by themselves: orthonormal, exact where they are the whole space, without invented directions."""

import pytest
import torch

from proma_trl.intra.noise import SketchNoise, Tokens
from proma_trl.intra.subspaces import dominant_subspace, fill_up, orthonormalize
from proma_trl.sequence_grads.forms import HeldFactor


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_orthonormal_columns_with_the_same_span(condition, dtype):
    columns = random(50, 8) @ torch.diag(condition ** -torch.linspace(0, 1, 8).double()) @ random(8, 8, seed=1)
    condition = float(torch.linalg.cond(columns))
    basis = orthonormalize(columns.to(dtype)).double()
    # What keeps the factorization from failing costs the smallest directions, squared, a few roundings in float64
    shift = 4 * 8 * torch.finfo(torch.float64).eps * condition**2
    assert torch.allclose(basis.T @ basis, torch.eye(8).double(), atol=max(10 * torch.finfo(dtype).eps, 2 * shift))
    rest = columns - basis @ (basis.T @ columns)
    assert rest.norm() <= 20 * (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps * condition) * columns.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_dependent_columns_become_zero(rank, dtype):
    columns = (random(50, rank) @ random(rank, 6, seed=1)).to(dtype)
    basis = orthonormalize(columns)
    lengths = basis.norm(dim=0)
    assert basis.isfinite().all() and int((lengths > 0.5).sum()) == rank and int((lengths == 0).sum()) == 6 - rank
    assert torch.allclose(basis @ (basis.T @ columns), columns, atol=1e-4)


def test_zero_and_parallel_columns_and_scales():
    columns = random(20, 6) * torch.tensor([1e-18, 0, 1e-18, 1e-18, 0, 1e-18])
    columns[:, 3] = -2 * columns[:, 0]
    basis = orthonormalize(columns)
    assert (basis.norm(dim=0) > 0.5).tolist() == [True, False, True, False, False, True]
    batch = orthonormalize(torch.stack([columns, torch.zeros_like(columns), 1e20 * columns]))
    assert torch.allclose(batch[0], basis) and not batch[1].any() and torch.allclose(batch[2], basis)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_as_many_columns_as_the_space_has_dimensions(iterations):
    for rows, size in ((40, 5), (4, 30)):
        matrix = random(2, rows // 2, size)
        noise = fill_up(random(rows, 10, seed=1))
        basis = dominant_subspace(HeldFactor(matrix), noise, torch.ones(rows, 1).double(), iterations)
        flat = matrix.flatten(0, 1)
        assert torch.allclose(flat @ basis @ basis.T, flat)
        assert int((basis.norm(dim=0) > 0.5).sum()) == min(rows, size)


def test_it_finds_what_dominates():
    left, _ = torch.linalg.qr(random(60, 12))
    right, _ = torch.linalg.qr(random(12, 12, seed=1))
    matrix = left @ torch.diag(2.0 ** -torch.arange(12).double()) @ right.T
    noise = fill_up(random(60, 3, seed=2))
    shares = []
    for iterations in (0, 1, 2, 20):
        basis = dominant_subspace(HeldFactor(matrix.view(3, 20, 12)), noise, torch.ones(60, 1).double(), iterations)
        shares.append(float((matrix @ basis).square().sum() / matrix.square().sum()))
    best = float((2.0 ** -(2 * torch.arange(3))).sum() / (2.0 ** -(2 * torch.arange(12))).sum())
    assert shares == sorted(shares) and shares[-1] == pytest.approx(best, abs=1e-9)
    singular = dominant_subspace(HeldFactor(matrix.view(3, 20, 12)), noise, torch.ones(60, 1).double(), 20)
    assert torch.allclose(singular @ singular.T, right[:, :3] @ right[:, :3].T, atol=1e-8)


def noise(key=(0, 0, 0, 0), name="w", length=40, k=3, dim=5, first=0):
    places = torch.arange(first, length).expand(k, -1)
    tokens = Tokens(places, torch.ones(k, length - first, 1), length)
    return SketchNoise(key, dim, k, torch.device("cpu"))(name, tokens, torch.float32)[..., :dim]


def test_noise_is_a_function_of_key_name_and_place():
    base = noise()
    assert torch.equal(noise(), base)
    assert torch.equal(noise(length=300)[:, :40], base) and torch.equal(noise(first=7), base[:, 7:])
    for key in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        assert not torch.isclose(noise(key), base).any()
    assert not torch.isclose(noise(name="v"), base).all()
    many = noise(length=20_000)
    assert abs(float(many.mean())) < 0.01 and 0.99 < float(many.var()) < 2.02
    assert float((many / many.std()).pow(4).mean()) == pytest.approx(3, abs=0.05)  # of a normal distribution
    assert abs(float((noise(length=20_000) * noise(name="other", length=20_000, key=(1, 1, 1, 1))).mean())) < 0.01
