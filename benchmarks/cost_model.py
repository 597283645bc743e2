"""
What both variants of PROMA cost on 1 to 1,024 GPUs, by arithmetic: memory, bytes sent, and time of a microbatch.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --sequences 8 --tokens 512 --gpus 8 64

Nothing is measured. The figures of the device are those of NVIDIA's data sheet for the H100 SXM: 989 TFLOP/s in
bfloat16 without sparsity, 3.35 TB/s of memory bandwidth, 80 GB, 900 GB/s of NVLink (450 each way) between the 8 GPUs
of a node, and 400 Gb/s of InfiniBand for each GPU between nodes. The assumptions:

- ZeRO-3, all parameters trained with AdamW in mixed precision: 16 bytes a parameter (bfloat16 weights and gradients,
  float32 weights and two moments), sharded over all GPUs. Activations are left out, as they are the same for all.
- A microbatch is `--sequences` times `--tokens` on each GPU. Forward and backward pass take 6 operations for each
  weight of a matrix and each token, and attention 12 * layers * heads * head size * T / 2 a token, at 65% of the peak.
- What a variant adds runs after the products, not beside them. It takes the larger of its operations at 65% of
  the peak and its bytes at 85% of the bandwidth, for the matrices of the body. The head is left out: what its sequence
  gradients cost depends on the memory budget.
- Accumulation-based: 6 k + 12 bytes for each weight (k sequence gradients in bfloat16, written once and read twice;
  what has been accumulated, read, and written and read as one more of them; the sum, written in float32), and
  2 k (k + 2) operations a weight. A local scope keeps 4 bytes a parameter on every GPU (2 with
  `projection_accumulator_dtype="bfloat16"`), a global one 4 / W. A global scope sends 2 (k + 1) (W - 1) / W bytes a
  parameter from each GPU.
- Intra-PROMA, dimension 10 (16 columns), one power iteration: 6 N columns (inputs + outputs) + 4 columns * weights
  operations; inputs and output gradients are read three times in bfloat16, inputs once for all layers that read them,
  and the weight's gradient is read twice and written once in float32. It keeps nothing and sends nothing.
"""

import argparse
from dataclasses import dataclass

from shapes import SHAPES, Shape

PEAK, BANDWIDTH, NVLINK, INFINIBAND, NODE = 989e12, 3.35e12, 450e9, 50e9, 8
OF_PEAK, OF_BANDWIDTH = 0.65, 0.85
COLUMNS = 16


@dataclass(frozen=True)
class Model(Shape):
    """A model by name, and what follows from its sizes."""

    name: str

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        wide, narrow = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, wide), (self.hidden, narrow), (self.hidden, narrow), (wide, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def read(self) -> list[int]:
        """Sizes of the inputs that a layer's matrices read, each once."""
        return [self.hidden, self.heads * self.head_size, self.hidden, self.intermediate]

    @property
    def body(self) -> int:
        """Weights of all matrices but the embedding and the head."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def parameters(self) -> int:
        """All parameters, but for norms and biases."""
        return self.body + (1 if self.tied else 2) * self.vocabulary * self.hidden


MODELS = (
    Model(**vars(SHAPES["0.6B"]), name="0.6B (Qwen3-0.6B)"),
    Model(3584, 28, 18_944, 28, 4, 128, 152_064, False, name="7B (Qwen2.5-7B)"),
    Model(8192, 80, 28_672, 64, 8, 128, 128_256, False, name="70B (Llama-3.1-70B)"),
)


def seconds(operations: float, bytes_moved: float = 0.0) -> float:
    """Modelled time of a kernel."""
    return max(operations / (OF_PEAK * PEAK), bytes_moved / (OF_BANDWIDTH * BANDWIDTH))


def ordinary_seconds(model: Model, k: int, tokens: int) -> float:
    """Forward and backward pass of a microbatch."""
    head = model.vocabulary * model.hidden
    attention = 12 * model.layers * model.heads * model.head_size * tokens / 2
    return seconds((6 * (model.body + head) + attention) * k * tokens)


def accumulation_seconds(model: Model, k: int) -> float:
    """What the accumulation-based variant adds."""
    return seconds(2 * k * (k + 2) * model.body, (6 * k + 12) * model.body)


def exchange_seconds(model: Model, k: int, gpus: int) -> float:
    """Time to send what a global scope sends."""
    return sent_bytes(model, k, gpus) / (NVLINK if gpus <= NODE else INFINIBAND)


def sent_bytes(model: Model, k: int, gpus: int) -> float:
    """What a global scope sends from each GPU for a microbatch."""
    return 2 * (k + 1) * (gpus - 1) / gpus * model.parameters


def intra_seconds(model: Model, k: int, tokens: int) -> float:
    """What Intra-PROMA adds."""
    n = k * tokens
    sizes = model.layers * (sum(model.read) + sum(outputs for _, outputs in model.matrices))
    operations = 6 * n * COLUMNS * sizes + 4 * COLUMNS * model.body
    return seconds(operations, 3 * 2 * n * sizes + 3 * 4 * model.body)


def table(model: Model, k: int, tokens: int, gpus: list[int]) -> str:
    """The model's table, in Markdown."""
    ordinary = ordinary_seconds(model, k, tokens)
    local, intra = accumulation_seconds(model, k) / ordinary, intra_seconds(model, k, tokens) / ordinary
    lines = [
        f"{model.name}: {model.parameters / 1e9:.2f} B parameters, {ordinary * 1e3:.0f} ms a microbatch of {k} x "
        f"{tokens:,} tokens. Beside it, a local scope takes {local:+.1%}, Intra-PROMA {intra:+.1%}.",
        "",
        "| GPUs | States, GB a GPU | + local | + global | + Intra-PROMA | Global sends, GB | Global takes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count in gpus:
        states, kept = 16 * model.parameters / count / 1e9, 4 * model.parameters / 1e9
        exchange = (accumulation_seconds(model, k) + exchange_seconds(model, k, count)) / ordinary
        lines.append(
            f"| {count:,} | {states:.2f} | {kept:.1f} | {kept / count:.2f} | 0 | "
            f"{sent_bytes(model, k, count) / 1e9:.1f} | {exchange:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4, help="sequences per microbatch and GPU, k")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per sequence, T")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 1024])
    arguments = parser.parse_args()
    tables = [table(model, arguments.sequences, arguments.tokens, arguments.gpus) for model in MODELS]
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
