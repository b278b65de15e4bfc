"""Rules that notice when a router goes wrong: its load, logits, entropy, or the gradient of its balance loss.

The rules read figures that all ranks have alike, so all ranks come to the same conclusions, and nothing is exchanged.
A rule judges every MoE layer after every step. An alarm starts when a layer is wrong, and ends when it has not been
wrong for `CALM` steps. Each is told once.

Shapes: L MoE layers, E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import CheckpointError
from moe.config import ModelConfig, RouterConfig
from training.config import HealthConfig
from training.report.alarms import Alarm

SPAN = 50
"""The number of steps that the mean of a figure covers. Older steps have exponentially smaller weights."""
SETTLED = 100
"""The number of steps before the mean of a figure is judged. Healthy routers are unbalanced at the start of a run."""
CALM = 50
"""The number of steps without a fault after which an alarm ends."""
LEAST_MISSED = 100
"""An expert is not called dead before a balanced router would have sent it this many tokens."""
GROWN = 3
"""A mean has grown if it is this many times its lowest value."""
LARGE_RANGE = 10
"""A range of the logits from which it is named as the cause of another fault, if it has grown."""
SHARP_RANGE = 4
"""A range of the logits from which probabilities cannot be nearly equal."""
LEAST_IMBALANCE = 0.5
"""E · Σ f² - 1 from which the load of a layer is far from balance: 0 at balance, 1 if half of the experts get all."""
LEAST_FOLLOWED = 0.05
"""The share of the imbalance that the balance loss must show at least if the logits are far apart."""

LOWER_LOGITS = "lower optim.lr or raise router.z_coef"
ENDED = {
    "dead_experts": "all experts get tokens again",
    "max_vio": "MaxVio is lower again",
    "router_logits": "the router's logits are smaller again",
    "router_entropy": "the entropy of the router's probabilities is higher again",
    "balance_loss": "the balance loss has an effect again",
}
"""What an alarm says when it ends, by its rule."""


class StepFigures(NamedTuple):
    """What the rules read of a step. Each figure has one value per MoE layer, and can be missing."""

    counts_LE: Tensor
    """Assignments to each expert before any drop, int64."""
    layers: Mapping[str, Sequence[float]]
    """`entropy`, `logit_range`, `z_loss`, `balance_loss` and so on, named as in `metrics.jsonl` after `router/`."""
    router_norms: Sequence[float] = ()
    """The norm of the gradient of each router; NaN if it is not known. Empty if the step was not measured."""


class Trend:
    """The mean of a figure over about `SPAN` steps, per layer, and its lowest and highest value since the start."""

    def __init__(self, layers: int) -> None:
        self.steps = [0] * layers
        """The number of figures so far."""
        self.mean = [0.0] * layers
        self.lowest: list[tuple[int, float]] = [(0, 0.0)] * layers
        """The lowest mean and its step."""
        self.highest: list[tuple[int, float]] = [(0, 0.0)] * layers

    def add(self, done: int, values: Sequence[float], first: int = 1) -> None:
        """Take the figures of a step. One that is not finite is left out.

        Args:
            first: the number of figures from which the lowest and the highest mean are kept.
        """
        for layer, value in enumerate(values):
            if not math.isfinite(value):
                continue
            self.steps[layer] += 1
            self.mean[layer] += (value - self.mean[layer]) / min(self.steps[layer], SPAN)
            now = done, self.mean[layer]
            if self.steps[layer] <= first:
                self.lowest[layer] = self.highest[layer] = now
            self.lowest[layer] = min(self.lowest[layer], now, key=itemgetter(1))
            self.highest[layer] = max(self.highest[layer], now, key=itemgetter(1))

    def settled(self, layer: int) -> bool:
        """Return whether the mean can be judged."""
        return self.steps[layer] >= SETTLED

    def has_grown(self, layer: int) -> bool:
        """Return whether the mean is `GROWN` times its lowest value."""
        return self.mean[layer] >= GROWN * self.lowest[layer][1]

    def has_fallen(self, layer: int) -> bool:
        """Return whether the mean is its highest value divided by `GROWN`."""
        return self.mean[layer] * GROWN <= self.highest[layer][1]

    def growth(self, layer: int) -> str:
        """Return the lowest value with its step, and the mean."""
        step, lowest = self.lowest[layer]
        return f"grew from {lowest:.2g} in step {step} to {self.mean[layer]:.3g}"

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "steps": list(self.steps),
            "mean": list(self.mean),
            "lowest": [list(pair) for pair in self.lowest],
            "highest": [list(pair) for pair in self.highest],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as after `state`."""
        self.steps, self.mean = list(state["steps"]), list(state["mean"])
        self.lowest, self.highest = ([(step, mean) for step, mean in state[name]] for name in ("lowest", "highest"))


class Absences:
    """How long each expert has got no token."""

    def __init__(self, layers: int, experts: int) -> None:
        self.since_LE = torch.zeros(layers, experts, dtype=torch.int64)
        """The first step of those without a token; 0: the expert got one in the last step."""
        self.missed_LE = torch.zeros(layers, experts, dtype=torch.float64)
        """The tokens that a balanced router would have sent the expert since."""
        self.longest = [0] * layers
        """The number of steps for which an expert of each layer has got no token, at most."""

    def add(self, done: int, counts_LE: Tensor) -> None:
        """Take the counts of a step."""
        absent_LE = counts_LE == 0
        self.since_LE = torch.where(absent_LE, self.since_LE.where(self.since_LE > 0, done), 0)
        self.missed_LE = torch.where(absent_LE, self.missed_LE + counts_LE.double().mean(dim=1, keepdim=True), 0)
        self.longest = torch.where(absent_LE, done - self.since_LE + 1, 0).amax(dim=1).tolist()

    def lasting(self, done: int, layer: int, steps: int) -> list[int]:
        """Return the steps since which experts of a layer have got no token, of those that got none for `steps`."""
        since_E, missed_E = self.since_LE[layer], self.missed_LE[layer]
        lasting_E = (since_E > 0) & (done - since_E + 1 >= steps) & (missed_E >= LEAST_MISSED)
        return since_E[lasting_E].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values: for each absent expert its layer, its index, and the two numbers."""
        places = self.since_LE.nonzero().tolist()
        return {
            "absent": [[*place, self.since_LE[*place].item(), self.missed_LE[*place].item()] for place in places],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as after `state`."""
        for layer, expert, since, missed in state["absent"]:
            self.since_LE[layer, expert], self.missed_LE[layer, expert] = since, missed


class Verdict(NamedTuple):
    """What a rule says of a layer that is wrong."""

    message: str
    """What is wrong, without the layer."""
    first_step: int


class RouterHealth:
    """The rules of a run over its routers, and their alarms.

    Args:
        unreached: the MoE layers whose router the gradient of the balance loss does not reach
            (`moe.router.balance_reaches`).
        trained: whether every router trains, so that its gradient should not be zero.
    """

    def __init__(
        self,
        config: HealthConfig,
        model: ModelConfig,
        router: RouterConfig,
        unreached: Sequence[int] = (),
        trained: bool = True,
    ) -> None:
        self.config, self.router, self.unreached, self.trained = config, router, unreached, trained
        self.experts, self.num_layers = model.num_experts or 0, model.num_moe_layers
        self.ceiling = self.experts / (model.top_k or 1) - 1
        """The largest MaxVio."""
        self.rules: dict[str, Callable[[int, int], Verdict | None]] = {
            "dead_experts": self.judge_absences,
            "max_vio": self.judge_load,
            "router_logits": self.judge_logits,
            "router_entropy": self.judge_entropy,
            "balance_loss": self.judge_balance,
        }
        """The name of each rule, and the function that says what is wrong with a layer after a step."""
        self._forget()

    def _forget(self) -> None:
        layers = self.num_layers
        self.absences = Absences(layers, self.experts)
        self.trends = {
            name: Trend(layers) for name in ("max_vio", "imbalance", "logit_range", "z_loss", "entropy", "balance_loss")
        }
        self.active: dict[tuple[str, int], tuple[int, int]] = {}
        """The alarms that have not ended: rule and layer -> the first and the last step at which it was wrong."""
        self.zero_gradients: set[int] = set()
        """The layers whose router had a gradient of zero the last time that it was measured."""

    def check(self, done: int, figures: StepFigures) -> list[Alarm]:
        """Take the figures of a step, and return the alarms that start or end."""
        self._add(done, figures)
        alarms = []
        for rule, judge in self.rules.items():
            for layer in range(self.num_layers):
                verdict, known = judge(done, layer), self.active.get((rule, layer))
                if verdict is not None:
                    first, _ = known or (verdict.first_step, done)
                    self.active[rule, layer] = first, done
                    if known is None:
                        alarms.append(Alarm(done, rule, layer, f"layer {layer}: {verdict.message}", first))
                elif known is not None and done - known[1] >= CALM:
                    first, last = self.active.pop((rule, layer))
                    message = f"layer {layer}: {ENDED[rule]} (it was so from step {first} to {last})"
                    alarms.append(Alarm(done, rule, layer, message, first, ended=True))
        return alarms

    def row(self) -> dict[str, int]:
        """Return `alarm/<rule>` for each rule that has an alarm: the number of layers."""
        row: dict[str, int] = {}
        for rule, _ in self.active:
            row[f"alarm/{rule}"] = row.get(f"alarm/{rule}", 0) + 1
        return row

    def _add(self, done: int, figures: StepFigures) -> None:
        counts_LE = figures.counts_LE
        self.absences.add(done, counts_LE)
        load_LE = counts_LE.double() / counts_LE.sum(dim=1, keepdim=True)
        self.trends["max_vio"].add(done, (self.experts * load_LE.amax(dim=1) - 1).tolist(), first=SETTLED)
        self.trends["imbalance"].add(done, (self.experts * load_LE.square().sum(dim=1) - 1).tolist())
        for name, values in figures.layers.items():
            if name in self.trends:
                self.trends[name].add(done, values)
        if figures.router_norms and self.trained:
            self.zero_gradients = {layer for layer, norm in enumerate(figures.router_norms) if norm == 0}

    def judge_absences(self, done: int, layer: int) -> Verdict | None:
        """Experts without tokens: one for `health.dead_steps`, or half of the experts for half as long."""
        steps = self.config.dead_steps
        if not steps or 2 * self.absences.longest[layer] < steps:
            return None
        since = self.absences.lasting(done, layer, -(-steps // 2))
        if not any(done - first + 1 >= steps for first in since) and 2 * len(since) < self.experts:
            return None
        count = f"{len(since)} of {self.experts} experts got no token since step {max(since)}"
        return Verdict(f"{count}; {self._cause(layer)}", min(since))

    def judge_load(self, done: int, layer: int) -> Verdict | None:
        """MaxVio near its ceiling, or much higher than it has been."""
        trend, limit = self.trends["max_vio"], self.config.max_vio
        if limit is None or not trend.settled(layer) or not self.ceiling:
            return None
        mean, ceiling = trend.mean[layer], f"at most {self.ceiling:.4g} = E/k - 1"
        if mean >= limit * self.ceiling:
            what = f"MaxVio is {mean:.3g}, near its ceiling ({ceiling})"
        elif mean >= 1 and trend.has_grown(layer):
            what = f"MaxVio {trend.growth(layer)} ({ceiling})"
        else:
            return None
        return Verdict(f"{what}; {self._cause(layer)}", done)

    def judge_logits(self, done: int, layer: int) -> Verdict | None:
        """Logits so far apart, or so large, that the softmax is a choice of one expert without a gradient."""
        limit = self.config.logit_range
        if limit is None:
            return None
        for name, least in (("logit_range", limit), ("z_loss", limit * limit)):
            trend = self.trends[name]
            if trend.settled(layer) and trend.mean[layer] >= least and trend.has_grown(layer):
                what = f"the router's {name.replace('_', ' ')} {trend.growth(layer)}"
                return Verdict(f"{what} (health.logit_range={limit:g}): {LOWER_LOGITS}", done)
        return None

    def judge_entropy(self, done: int, layer: int) -> Verdict | None:
        """Probabilities of which one is nearly 1 for each token."""
        trend, limit = self.trends["entropy"], self.config.entropy
        if limit is None or not trend.settled(layer) or trend.mean[layer] >= limit or not trend.has_fallen(layer):
            return None
        step, highest = trend.highest[layer]
        what = f"the router's entropy fell from {highest:.2g} in step {step} to {trend.mean[layer]:.2g} of ln E"
        return Verdict(f"{what} (health.entropy={limit:g}); {self._cause(layer)}", done)

    def judge_balance(self, done: int, layer: int) -> Verdict | None:
        """A balance loss that is part of the loss, and does not change the router."""
        if not self.router.balance_coef:
            return None
        given = f"router.balance_coef={self.router.balance_coef:g}"
        if layer in self.unreached:
            return Verdict(
                f"the balance loss does not reach the router ({given}): the probabilities of "
                f"router.kind={self.router.kind} do not depend on its weights, or have no gradient",
                1,
            )
        if layer in self.zero_gradients:
            return Verdict(
                f"the router's gradient is zero, that of the balance loss too ({given}); {self._cause(layer)}", done
            )
        width, imbalance, balance = (self.trends[name] for name in ("logit_range", "imbalance", "balance_loss"))
        if (
            all(trend.settled(layer) for trend in (width, imbalance, balance))
            and width.mean[layer] >= SHARP_RANGE
            and imbalance.mean[layer] >= LEAST_IMBALANCE
            and balance.mean[layer] - 1 <= LEAST_FOLLOWED * imbalance.mean[layer]
        ):
            return Verdict(
                f"the balance loss is {balance.mean[layer]:.3g} although the load is not balanced (MaxVio "
                f"{self.trends['max_vio'].mean[layer]:.3g}): the probabilities of router.kind={self.router.kind} do "
                "not follow its logits",
                done,
            )
        return None

    def _cause(self, layer: int) -> str:
        """Return the likely cause of a load that is not balanced, and the keys to change."""
        width, router = self.trends["logit_range"], self.router
        if width.steps[layer] and width.mean[layer] >= LARGE_RANGE and width.has_grown(layer):
            return f"the router's logit range {width.growth(layer)}: {LOWER_LOGITS}"
        if ("balance_loss", layer) in self.active:
            return "the balance loss has no effect"
        if not router.balance_coef and not router.bias_update_rate:
            return "nothing balances the load: raise router.balance_coef, or lower optim.lr"
        key = "bias_update_rate" if router.bias_update_rate else "balance_coef"
        return f"raise router.{key} ({getattr(router, key):g}), or lower optim.lr"

    def state_dict(self) -> dict[str, Any]:
        """Return what a later launch needs to come to the same conclusions, as JSON values."""
        return {
            "absences": self.absences.state_dict(),
            "trends": {name: trend.state_dict() for name, trend in self.trends.items()},
            "active": [[*key, *steps] for key, steps in self.active.items()],
            "zero_gradients": sorted(self.zero_gradients),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as after `state`, which is empty for a new run.

        Raises:
            CheckpointError: `state` is not what `state_dict` has returned for a model of this shape.
        """
        self._forget()
        if not state:
            return
        try:
            self.absences.load_state_dict(state["absences"])
            for name, trend in self.trends.items():
                trend.load_state_dict(state["trends"][name])
            self.active = {(rule, layer): (first, last) for rule, layer, first, last in state["active"]}
            self.zero_gradients = set(state["zero_gradients"])
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError("expected the state of a run ('health.routers')") from error
