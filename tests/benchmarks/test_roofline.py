"""The model of step times counts kernels as its docstring says, and whole steps as closed forms do."""

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import lengths  # noqa: E402
import roofline  # noqa: E402
from common import Shape, make_parser, model_shape  # noqa: E402
from roofline import Cache, Device, Kernel, KernelCounter, Region  # noqa: E402

PAGE, LENGTH = roofline.PAGE, 16


def counted(function, on_fake=False):
    """The kernels that a function asks for, without their callers."""
    if on_fake:
        with roofline.counting(on_gpu=True) as counter:
            function()
    else:
        with KernelCounter() as counter:
            function()
    found = Counter()
    for kernel, count in counter.kernels.items():
        found[kernel.name, kernel.operations, kernel.precision, kernel.bytes_moved] += count
    return found


def small_case(layers=1, **settings):
    options = ["--hidden", "64", "--layers", str(layers), "--vocabulary", "320"]
    defaults = {"device": "cpu", "bf16": True, "sequences": 4, "microbatches": 2, "budget": 1.0}
    return make_parser("", **(defaults | settings)).parse_args(options)


@cache
def small_step(algorithm, layers=1, **settings):
    """The kernels of a step of a small model, of 16 tokens a sequence."""
    return roofline.count_step(small_case(layers, **settings), LENGTH, algorithm)


def one(function):
    """The only kernel that a function asks for."""
    ((kernel, count),) = counted(function).items()
    assert count == 1
    return kernel


def test_products():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert one(lambda: a @ b) == ("mm", 2 * 3 * 5 * 7, "single", 4 * (15 + 35 + 21))
    half = a.bfloat16(), b.bfloat16()
    assert one(lambda: half[0] @ half[1]) == ("mm", 2 * 3 * 5 * 7, "half", 2 * (15 + 35 + 21))
    double = a.double(), b.double()
    assert one(lambda: double[0] @ double[1]) == ("mm", 2 * 3 * 5 * 7, "double", 8 * (15 + 35 + 21))
    x, total = torch.ones(5), torch.ones(3, 7)
    assert one(lambda: a @ x) == ("mv", 2 * 3 * 5, "single", 4 * (15 + 5 + 3))
    assert one(lambda: total.addmm_(a, b)) == ("addmm_", 2 * 3 * 5 * 7, "single", 4 * (15 + 35 + 2 * 21))
    # A matrix by itself is read once
    assert one(lambda: a @ a.mT) == ("mm", 2 * 3 * 5 * 3, "single", 4 * (15 + 9))


def test_products_with_a_wide_sum():
    def products():
        left = torch.empty(2, 3, 5, dtype=torch.bfloat16)
        right = torch.empty(2, 5, 7, dtype=torch.bfloat16)
        out = torch.bmm(left, right, out_dtype=torch.float32)
        assert out.dtype == torch.float32 and out.shape == (2, 3, 7)
        total = torch.empty(3, 7)
        torch.addmm(total, left[0], right[0], out_dtype=torch.float32, out=total)

    assert counted(products, on_fake=True) == {
        ("bmm", 2 * 2 * 3 * 5 * 7, "half", 2 * 2 * (15 + 35) + 4 * 2 * 21): 1,
        ("addmm", 2 * 3 * 5 * 7, "half", 2 * (15 + 35) + 4 * 2 * 21): 1,
    }


def test_elementwise():
    x, row = torch.ones(6, 8), torch.ones(8)
    assert one(lambda: x + row) == ("add", 48, "single", 4 * (48 + 8 + 48))
    assert one(lambda: x + row.expand(6, 8)) == ("add", 48, "single", 4 * (48 + 8 + 48))
    assert one(lambda: x * x) == ("mul", 48, "single", 4 * (48 + 48))
    assert one(lambda: x[:, :4] * 2) == ("mul", 24, "single", 4 * (24 + 24))
    assert one(lambda: x.add_(1)) == ("add_", 48, "single", 4 * (48 + 48))
    assert one(lambda: x.copy_(row)) == ("copy_", 48, "single", 4 * (8 + 48))
    assert one(lambda: x.sum(0, dtype=torch.float64)) == ("sum", 48, "double", 4 * 48 + 8 * 8)
    assert one(lambda: x.to(torch.bfloat16)) == ("_to_copy", 48, "single", 4 * 48 + 2 * 48)
    assert one(lambda: torch.zeros(6, 8)) == ("zeros", 48, "single", 4 * 48)


def test_lookups_read_and_additions_by_index_change_what_they_touch():
    x, index, values = torch.ones(100, 8), torch.tensor([3, 5]), torch.ones(2, 8)
    assert one(lambda: x.index_select(0, index)) == ("index_select", 16, "single", 4 * 16 + 16 + 4 * 16)
    assert one(lambda: x[index]) == ("index", 16, "single", 4 * 16 + 16 + 4 * 16)
    assert one(lambda: x.index_add_(0, index, values)) == ("index_add_", 16, "single", 4 * 3 * 16 + 16)
    assert one(lambda: x.index_copy_(0, index, values)) == ("index_copy_", 16, "single", 4 * 2 * 16 + 16)
    places = index.unsqueeze(1).expand(2, 8)
    assert one(lambda: x.scatter_add_(0, places, values)) == ("scatter_add_", 16, "single", 4 * 3 * 16 + 16)
    assert one(lambda: x.gather(0, places)) == ("gather", 16, "single", 4 * 16 + 16 + 4 * 16)


def test_views_are_free():
    x = torch.ones(6, 8)

    def views():
        x.view(8, 6).mT[2:].unsqueeze(0).expand(3, -1, -1).detach()
        x.split(2)
        torch.empty(6, 8)
        x.new_empty(3)
        torch.empty(4, 1).squeeze_()

    assert not counted(views)


def test_attention():
    k, heads, kv_heads, tokens, size = 2, 4, 2, 8, 16

    def attend():
        def tensor(count):
            return torch.empty(k, count, tokens, size, dtype=torch.bfloat16, requires_grad=True)

        query, key, value = tensor(heads), tensor(kv_heads), tensor(kv_heads)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (query, key, value), torch.empty_like(out))

    found = {name: (operations, precision) for name, operations, precision, _ in counted(attend, on_fake=True)}
    forward = 2 * k * heads * tokens * tokens * size
    name = "_scaled_dot_product_flash_attention_for_cpu"
    assert found == {name: (forward, "half"), f"{name}_backward": (5 * forward // 2, "half")}


def test_what_depends_on_inputs_alone_is_computed():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with roofline.counting(on_gpu=True):
        values = torch.empty(2, 3, 4)
        assert mask.sum(1).tolist() == [2, 3]
        assert values[mask].shape == (5, 4)
        assert values.masked_select(mask.unsqueeze(-1)).shape == (20,)
        assert values.sum().item() == 1.0
    with roofline.counting(on_gpu=True) as counter:
        values[mask].sum()
        x = torch.empty(4, requires_grad=True)
        torch.empty(()).masked_scatter(torch.tensor(True), x).backward()
        assert x.grad.shape == (4,)
    assert counter.kernels


def test_the_slower_of_operations_and_bytes_counts():
    device = Device(half=1000, single=100, double=10, bandwidth=50, of_peak=0.5, of_bandwidth=0.8)
    assert device.seconds(Kernel("", "", 3000, "half", 40)) == 6
    assert device.seconds(Kernel("", "", 3000, "single", 40)) == 60
    assert device.seconds(Kernel("", "", 3000, "double", 40)) == 600
    assert device.seconds(Kernel("", "", 3000, "half", 4000)) == 100


def test_pages():
    assert list(Region(7, PAGE - 8, ((1, 16),)).pages()) == [((7, 0), 8), ((7, 1), 8)]
    # Rows that lie far apart
    assert list(Region(7, 0, ((10 * PAGE, 3), (1, 8))).pages()) == [((7, page), 8) for page in (0, 10, 20)]
    # Gaps of less than a page
    assert list(Region(7, 0, ((16, 2), (1, 8))).pages()) == [((7, 0), 24)]


def test_the_cache_holds_what_was_used_last():
    def pages(storage, count):
        return Region(storage, 0, ((1, count * PAGE),))

    cache = Cache(3 * PAGE)
    assert cache.read(pages(0, 2)) == 2 * PAGE
    assert cache.read(pages(0, 2)) == 0
    cache.write(pages(1, 1))
    assert cache.read(pages(1, 1)) == 0
    assert cache.read(pages(0, 1)) == 0
    # Of pages 0.1, 1.0 and 0.0, in the order of their last use, the first makes room
    assert cache.read(pages(2, 1)) == PAGE
    assert cache.read(pages(1, 1)) == 0
    assert cache.read(pages(0, 1)) == 0
    assert cache.read(pages(0, 2)) == PAGE
    # What is larger than the cache is never found again
    assert cache.read(pages(3, 4)) == cache.read(pages(3, 4)) == 4 * PAGE


def test_the_cache_spares_reads():
    x = torch.ones(PAGE)
    with KernelCounter(Cache(2**20)) as counter:
        y = x * 2
        y + x
        y.index_select(0, torch.tensor([0]))
    assert [kernel.bytes_moved for kernel in counter.kernels] == [2 * 4 * PAGE, 4 * PAGE, 4 + 8 + 4]


def test_shapes():
    parser = make_parser("")
    assert model_shape(parser.parse_args([])) == Shape(512, 4, 1536, 8, 4, 64, 4096, True)
    large = parser.parse_args(["--model", "8B", "--layers", "2"])
    assert (large.hidden, large.layers, large.vocabulary) == (4096, 2, 151_936)
    assert model_shape(large) == Shape(4096, 2, 12_288, 32, 8, 128, 151_936, False)


def product_operations(kernels):
    names = {"mm", "bmm", "addmm", "baddbmm"}
    return sum(count * kernel.operations for kernel, count in kernels.items() if kernel.name.rstrip("_") in names)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_of_a_whole_step(checkpointing):
    case, found = small_case(2), small_step("grpo", 2, checkpointing=checkpointing)
    shape = model_shape(case)
    wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    layer = shape.hidden * (2 * wide + 2 * narrow) + 3 * shape.hidden * shape.intermediate
    tokens, scored = case.sequences * LENGTH, case.sequences * LENGTH // 2
    # Two operations a weight and token forward, and four backward. The head makes its logits again. With
    # checkpointing, layers run again up to their last product, whose output the backward pass doesn't need.
    again = layer - shape.hidden * shape.intermediate if checkpointing else 0
    head = 4 * 2 * shape.vocabulary * shape.hidden
    want = 2 * (3 * layer + again) * shape.layers * tokens + head * scored
    assert product_operations(found) == case.microbatches * want


def test_a_cache_saves_time_and_no_operations():
    device, without = roofline.DEVICES["h100"], small_step("grpo")
    found = roofline.count_step(small_case(), LENGTH, "grpo", cache_bytes=2**20)
    assert product_operations(found) == product_operations(without)
    assert 0 < roofline.modelled_seconds(found, device) < roofline.modelled_seconds(without, device)


@pytest.mark.parametrize(("algorithm", "layers"), [("grpo", 4), ("proma", 3)])
def test_layers_are_alike(algorithm, layers):
    one, two, all_layers = (small_step(algorithm, count) for count in (1, 2, layers))
    device, found = roofline.DEVICES["a100"], roofline.extrapolated(one, two, layers)
    want = roofline.modelled_seconds(all_layers, device)
    assert roofline.modelled_seconds(found, device) == pytest.approx(want, rel=1e-9)
    assert product_operations(found) == product_operations(all_layers)
    assert sum(found.values()) == sum(all_layers.values())
    assert want > 1.5 * roofline.modelled_seconds(one, device)


def test_steps_of_all_algorithms():
    device = roofline.DEVICES["h100"]
    algorithms = ("grpo", "reinforce", "proma", "proma_intra", "proma_both")
    seconds = {name: roofline.modelled_seconds(small_step(name), device) for name in algorithms}
    assert seconds["reinforce"] == pytest.approx(seconds["grpo"], rel=0.01)
    assert seconds["grpo"] < seconds["proma"] < seconds["proma_both"]
    assert seconds["grpo"] < seconds["proma_intra"] < seconds["proma_both"]


def test_a_count_is_the_same_twice():
    assert roofline.count_step(small_case(), LENGTH, "proma_both") == small_step("proma_both")


def test_every_microbatch_counts():
    steps = [small_step("proma", microbatches=count) for count in (2, 3, 5)]
    two, three, five = (roofline.modelled_seconds(step, roofline.DEVICES["h100"]) for step in steps)
    assert five - three == pytest.approx(2 * (three - two))
    assert three - two > 0.1 * two


def test_a_fake_step_has_the_kernels_of_a_real_one():
    case = small_case(bf16=False)
    want = roofline.count_step(case, LENGTH, "grpo", on_gpu=False)
    trainer = roofline.make_checked_trainer(case, LENGTH, "grpo")
    microbatches = [roofline.make_full_inputs(case, LENGTH, seed) for seed in range(2)]
    roofline.step(trainer, microbatches, "cpu")
    with KernelCounter() as counter:
        roofline.step(trainer, microbatches, "cpu")
    assert product_operations(counter.kernels) == product_operations(want) > 0
    device = roofline.DEVICES["h100"]
    seconds = roofline.modelled_seconds(want, device)
    assert roofline.modelled_seconds(counter.kernels, device) == pytest.approx(seconds, rel=0.02)


def test_it_prints_a_table(capsys, tmp_path):
    options = ["--layers", "1", "--grid", "16:2", "--algorithm", "reinforce", "proma", "--kernels"]
    output = tmp_path / "roofline.json"
    roofline.main(["--device", "h100", "h200", *options, "--output", str(output)])
    printed = capsys.readouterr().out
    head, *rows = [line.split() for line in printed.split("\n\n")[0].splitlines()]
    assert head == ["device", "model", "T", "k", "algorithm", "ms", "ratio"]
    assert [row[:5] for row in rows] == [
        [device, "0.6B", "16", "2", algorithm]
        for algorithm in ("grpo", "reinforce", "proma")
        for device in ("h100", "h200")
    ]
    assert [row[-1] for row in rows[:2]] == ["1.000", "1.000"]
    assert "ChunkedLogProbFunction.backward" in printed and "_fused_adamw_" in printed
    results = json.loads(output.read_text())["results"]
    assert results[1] == {
        "device": "h200",
        "model": "0.6B",
        "length": 16,
        "sequences": 2,
        "algorithm": "grpo",
        "seconds": pytest.approx(float(rows[1][5]) / 1e3, rel=1e-3),
        "ratio": 1.0,
    }


COMPLETIONS, PROMPTS = lengths.Lengths(20.0, 0.7, 64), lengths.Lengths(8.0, 0.3, 16)


def rollout_step(layout):
    return roofline.rollout_step(COMPLETIONS, PROMPTS, layout, sequences=4, microbatches=3)


def test_steps_on_rollouts():
    """Each layout holds the same tokens, and its positions are those that `lengths.py` counts."""
    rollout = lengths.draw_rollout(COMPLETIONS, PROMPTS, 1020, 4, seed=0)
    for layout in lengths.LAYOUTS:
        step = rollout_step(layout)
        assert len(step.microbatches) == 3
        real = lengths.real_tokens([x for part in step.microbatches for x in part])
        if layout == "packed":
            assert real == pytest.approx(step.num_tokens, rel=0.05) and step.attention > 1.05
            continue
        counted = lengths.step_positions(rollout, layout, 12, 4, seed=0)[0]
        assert real == step.num_tokens and step.attention == 1.0
        assert step.positions * real == pytest.approx(sum(counted))


def test_inputs_of_a_rollout():
    sequences = [lengths.Tokens(2, 3), lengths.Tokens(3, 1)]
    inputs = roofline.make_rollout_inputs(sequences, (4, 5), 320, 40)
    assert inputs["prompt_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert inputs["completion_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert inputs["prompt_ids"].shape == (2, 4) and inputs["completion_ids"].shape == (2, 5)
    assert inputs["num_items_in_batch"] == 40


def test_products_of_a_step_on_a_rollout():
    """All positions go through the layers, and the real tokens of completions through the head."""
    case = small_case(microbatches=3)
    shape = model_shape(case)
    wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    layer = shape.hidden * (2 * wide + 2 * narrow) + 3 * shape.hidden * shape.intermediate
    for layout in ("padded", "ordered"):
        step = rollout_step(layout)
        scored = sum(x.completion for part in step.microbatches for x in part)
        head = 4 * 2 * shape.vocabulary * shape.hidden
        positions = sum(4 * sum(width) for width in step.widths)
        want = 3 * 2 * layer * shape.layers * positions + head * scored
        assert product_operations(roofline.count_rollout_step(case, step, "grpo")) == pytest.approx(want, rel=0.03)


def test_attention_of_packed_sequences():
    """It is that of the sequences' true lengths, each by itself, and not that of their mean length."""
    case, step = small_case(microbatches=3), rollout_step("packed")
    shape, tokens = model_shape(case), sum(step.widths[0])
    found = sum(
        count * kernel.operations
        for kernel, count in roofline.count_rollout_step(case, step, "grpo").items()
        if kernel.name in roofline._ATTENTION
    )
    forward = 2 * case.sequences * shape.heads * tokens**2 * shape.head_size
    assert found == pytest.approx(step.attention * case.microbatches * 3.5 * forward, rel=1e-6)
    true = [sum(x) for part in rollout_step("trimmed").microbatches for x in part]
    assert step.attention * 12 * tokens**2 == pytest.approx(sum(x**2 for x in true))


def test_it_prints_a_table_of_lengths(capsys, tmp_path):
    options = ["--lengths", "lognormal:6:0.5:16", "--prompt-lengths", "constant:4", "--layers", "1"]
    options += ["--sequences", "2", "--microbatches", "2", "--algorithm", "reinforce", "--layout", "ordered"]
    roofline.main([*options, "--output", str(tmp_path / "roofline.json")])
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["device", "model", "T", "algorithm", "layout", "positions", "ms", "ratio"]
    assert [row[3:5] for row in rows] == [["grpo", "padded"], ["reinforce", "ordered"]]
    results = json.loads((tmp_path / "roofline.json").read_text())["results"]
    assert results[0]["length"] == "lognormal:6:0.5:16" and results[0]["ratio"] == 1.0
    assert results[1]["positions"] < results[0]["positions"] and results[1]["ratio"] < 1.0


@pytest.mark.parametrize("options", [["--lengths", "256"], ["--measure", "--lengths", "lognormal:6:0.5:16"]])
def test_lengths_that_do_not_fit_the_mode(options, capsys):
    with pytest.raises(SystemExit):
        roofline.main(options)
    assert "--lengths takes distributions" in capsys.readouterr().err
