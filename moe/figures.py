"""Names of what is measured of routers. This module does not import torch, so that plans can use it."""

TOKEN_FIGURES = ("entropy", "margin", "logit_range")
"""The figures of each token that every router sums (`moe.router.Router.token_figures`). They are logged as
`router/<name>`."""
LAYER_FIGURES = ("balance_loss", "z_loss", *TOKEN_FIGURES)
"""The figures of each layer that `moe.losses.auxiliary_losses` adds up."""
METRICS = (
    *("auxiliary_loss", "balance_loss", "churn", "dead", "drop_rate", "grad_norm", "load", "load_entropy", "max_vio"),
    *("rank_load_max", "straggler", "straggler_placed", "weight_norm", "z_loss", *TOKEN_FIGURES),
)
"""The metrics `router/<name>` that runs log for every kind of router. No kind can use their names (`TELEMETRY`)."""
