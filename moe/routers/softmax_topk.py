"""`router.kind=softmax_topk`: the k experts with the highest softmax probability."""

from moe.router import ROUTERS, Router


@ROUTERS.register("softmax_topk")
class SoftmaxTopKRouter(Router):
    """The k most probable experts, with their probabilities as weights, renormalised for k > 1 unless configured
    otherwise (Switch, arXiv 2101.03961; GLaM, 2112.06905; Mixtral, 2401.04088; DeepSeekMoE, 2401.06066)."""
