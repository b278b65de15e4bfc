"""A workspace of W&B for the runs of a project: the panels of a mixture of experts in their sections."""

from typing import Any

LAYERS = "/layer_[0-9]+$"
"""The end of a metric that every MoE layer has. A panel shows all of them, for any number of layers."""
SECTIONS: dict[str, tuple[tuple[str, tuple[str, ...] | str], ...]] = {
    "Loss": (
        ("loss and cross-entropy", ("train/loss", "train/ce")),
        ("held-out loss", ("eval/loss",)),
        ("held-out bits per byte, by domain", "^eval/bits_per_byte/"),
    ),
    "Router": (
        ("MaxVio: 0 = balanced", ("router/max_vio",)),
        ("MaxVio of each layer", f"^router/max_vio{LAYERS}"),
        ("balance loss and z-loss", ("router/balance_loss", "router/z_loss")),
        ("experts without a token", ("router/dead",)),
        ("dropped assignments", ("router/drop_rate",)),
        ("entropy of the load and of the tokens", ("router/load_entropy", "router/entropy")),
        ("router logit range of each layer", f"^router/logit_range{LAYERS}"),
        ("margin between the last chosen expert and the next", ("router/margin",)),
        ("share of probe tokens that changed experts", ("router/churn",)),
        ("straggler factor over N expert-parallel ranks", "^router/straggler/ep_"),
        ("alarms: layers that warn", "^alarm/"),
    ),
    "Optimizer and speed": (
        ("learning rate", ("optim/lr",)),
        ("gradient norm before clipping", ("optim/grad_norm",)),
        ("tokens per second", ("speed/tokens_per_s",)),
        ("MFU", ("speed/mfu",)),
    ),
}
"""Section -> (title, the names of its metrics, or a regular expression of them) of each panel."""
PICTURES = ("overview", "expert_load", "curves")
"""The plots of a finished run."""


def workspace(entity: str, project: str, name: str) -> Any:
    """Return a workspace of the package wandb-workspaces. Its method `save` sends it to W&B, with the user's API key.

    A panel stays empty if no run has its metrics. The load of the experts is a histogram. W&B makes a panel for it
    in the section `experts` by itself.
    """
    from wandb_workspaces.reports import v2 as panels
    from wandb_workspaces.workspaces import Section, Workspace, WorkspaceSettings

    def line_plot(title: str, metrics: tuple[str, ...] | str) -> Any:
        chosen = {"metric_regex": metrics} if isinstance(metrics, str) else {"y": list(metrics)}
        return panels.LinePlot(title=title, x="step", title_x="step", **chosen)

    sections = [
        Section(name=section, panels=[line_plot(*panel) for panel in plots], is_open=True)
        for section, plots in SECTIONS.items()
    ]
    pictures: list[Any] = [
        panels.MediaBrowser(title=picture, media_keys=[picture], num_columns=1) for picture in PICTURES
    ]
    return Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[*sections, Section(name="Pictures of finished runs", panels=pictures)],
        settings=WorkspaceSettings(x_axis="step", group_by_prefix="first"),
        auto_generate_panels=True,
    )
