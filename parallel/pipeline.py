"""Pipeline parallelism (placeholder until it lands)."""


class Pipeline: ...
