"""What runs need beside the method: data and rewards, evaluation, metrics, curves and figures."""
