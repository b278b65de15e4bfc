"""`python vllm_worker.py REQUEST OUT` writes vLLM's greedy tokens for some prompts to OUT. Runs in .venv-serving."""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(sys.argv[1])
    engine = LLM(request["model"], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4)
    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    outputs = engine.generate(request["prompts"], greedy)
    rows = [{"prompt": list(out.prompt_token_ids), "new": list(out.outputs[0].token_ids)} for out in outputs]
    Path(sys.argv[2]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
