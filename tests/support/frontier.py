"""The comparison of docs/protocol.md without its training."""


def make_all(plan, score):
    """Makes the plan's runs in the order in which it asks for them; returns them with their scores."""
    scores = {}
    while missing := plan.missing(scores):
        assert len(set(missing)) == len(missing) and not set(missing) & set(scores)
        scores[missing[0]] = score(missing[0])
    return scores
