"""One cold process: CPU seconds and memory of planning one configuration. Prints a line of JSON.

Usage: planning_seconds.py CONFIG TP PHASE MEMORY_GB
"""

import json
import resource
import sys
import time

STAGES = ("trace", "formulate", "solve", "lower")


def main(config: str, tp: str, phase: str, memory_gb: str) -> None:
    """Imports, then plans."""
    start = time.process_time()
    import networkx  # noqa: F401  torch.export imports it when first called
    import transformers.models.llama.modeling_llama  # noqa: F401

    import colrow.planner.planning as planning
    import colrow.planner.solving as solving
    from colrow.planner.sources import load_source

    imported = time.process_time()
    stages = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str) -> None:
        module = planning if hasattr(planning, stage) else solving
        function = getattr(module, stage)

        def run(*args, **kwargs):
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                stages[stage] += time.process_time() - begin

        setattr(module, stage, run)

    for stage in STAGES:
        timed(stage)
    modules = len(sys.modules)
    begin = time.process_time()
    source = load_source(config, phase=phase, batch=1, seq=2048)
    plan = planning.plan(source.model, source.example_inputs, tp=int(tp), phase=phase, memory_gb=float(memory_gb))
    total = time.process_time() - begin
    found = {
        "import_s": imported - start,
        "total_s": total,
        "stages_s": stages,
        "late_imports": len(sys.modules) - modules,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "proven": plan.cost.proven,
        "digest": plan.digest,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
