"""Byteloom models in EleutherAI's lm-evaluation-harness.

    import byteloom.harness                                       registers the model `byteloom`
    lm_eval.simple_evaluate("byteloom", "run=runs/first", tasks=…)

lm_eval has no hook for models of other packages, so its own command does not find the model. `byteloom harness run RUN`
and `python -m byteloom.harness` are that command after this import.
"""

from byteloom.core.packages import needed_by

with needed_by("byteloom.harness", "lm-eval"):
    from lm_eval.api.registry import model_registry

model_registry.register("byteloom", target="byteloom.harness.model:ByteloomLM")
