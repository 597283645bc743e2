"""
Where the time of PROMATrainer's optimizer step goes beyond an ordinary one.

    python benchmarks/profile_step.py --lengths 256 --prompt 0.02

Profiles whole steps on a CPU, where all parts run one after another, and gives the parts' shares of the time. It takes
the options of `step_time.py`, other than `--output`.
"""

from common import StepProfile, make_microbatches, make_parser, make_prepared_trainer, method_settings, step

from proma_trl import PROMAConfig, PROMATrainer

# Functions of the package: file and name
EMISSION = ("accumulation/emission.py", "emit")
METRICS = ("accumulation/emission.py", "metrics")
INNER_PRODUCTS = ("accumulation/accumulators.py", "inner_products")
GRAM = ("accumulation/accumulators.py", "_gram")
COEFFICIENTS = ("rules/proma.py", "coefficients")
ROWS = ("sequence_grads/tensor.py", "rows")
COMBINE = ("sequence_grads/tensor.py", "combine")
ORDINARY = tuple(
    (file, name)
    for file in ("sequence_grads/forms.py", "trainer/fused_head.py")
    for name in ("combine", "add_combined")
)
HEAD = ("trainer/fused_head.py", "backward")


def parts(profile: StepProfile) -> dict[str, float]:
    """Seconds of each part. The indented ones add up to all of the update rule's work."""
    everything = profile.time(EMISSION)
    rows, gram = profile.time(ROWS), profile.time(GRAM)
    products, coefficients = profile.time(INNER_PRODUCTS), profile.time(COEFFICIENTS, caller=EMISSION)
    combine = profile.time(COMBINE)
    # Where sequence gradients are not held, `sum_i c_i s_i` comes from one product, as in an ordinary backward pass
    ordinary = profile.time(*ORDINARY, caller=COMBINE)
    return {
        "all of the update rule's work": everything,
        "  sequence gradients": rows,
        "  first microbatch's gradients": ordinary,
        "  Gram matrices": gram,
        "  coefficients": coefficients,
        "  overlaps and norm": products - rows - gram,
        "  weighted sum": combine - ordinary,
        "  bookkeeping": everything - products - coefficients - combine,
        "what the rule logs": profile.time(METRICS),
        "the head's backward pass, with its projection": profile.time(HEAD),
    }


def main() -> None:
    parser = make_parser(__doc__, device="cpu")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("only on a CPU does the backward pass run in the thread that is profiled")
    for length in arguments.lengths:
        settings = method_settings(arguments, "proma")
        trainer = make_prepared_trainer(PROMATrainer, PROMAConfig, arguments, length, **settings)
        microbatches = make_microbatches(arguments, length)
        step(trainer, microbatches, "cpu")
        profile = StepProfile(trainer, microbatches, arguments.repeats)
        print(f"T = {length}: {profile.seconds / arguments.repeats:.3f} s a step")
        for name, seconds in parts(profile).items():
            print(f"  {seconds / profile.seconds:>6.1%}  {name}")


if __name__ == "__main__":
    main()
