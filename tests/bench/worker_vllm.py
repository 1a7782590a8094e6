"""vLLM without its server: a worker of run.py (see server/bench/sides.py). worker_vllm.py FOLDER"""

import sys
import time

import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from worker import answer_jobs

LONGEST, STREAMS = 4096, 32
ROUND = 64
"""As in engine/bench/loads.py."""


class Engine:
    """In processes of its own, as vLLM runs on CPUs; no prefix is shared.

    Sizes are those that run.py gives its server, so that both use what was compiled once.
    """

    def __init__(self, folder: str) -> None:
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=folder,
                dtype="bfloat16",
                skip_tokenizer_init=True,
                max_model_len=LONGEST + 2 * ROUND,
                max_num_seqs=STREAMS,
                max_num_batched_tokens=2048,
                enable_prefix_caching=False,
            )
        )
        self.vocab = self.engine.model_config.get_vocab_size()
        self.requests = 0

    def send(self, tokens: int, output: int) -> str:
        self.requests += 1
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False)
        prompt = [((i + self.requests) * 7919 + 13) % self.vocab for i in range(tokens)]
        return self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, sampling)

    def prefill(self, tokens: int, seconds: float) -> float:
        begin, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - begin < seconds:
            self.send(tokens, 1)
            while self.engine.has_unfinished_requests():
                self.engine.step()
            done += tokens
        return done / (time.perf_counter() - begin)

    def decode(self, streams: int, context: int, seconds: float) -> float:
        """From when every stream has begun; none ends meanwhile."""
        names = [self.send(context, 2 * ROUND) for _ in range(streams)]
        drawing: set[str] = set()
        while len(drawing) < streams:
            drawing |= {answer.request_id for answer in self.engine.step()}
        begin, done = time.perf_counter(), 0
        while done < 4 * streams or (done < ROUND * streams and time.perf_counter() - begin < seconds):
            done += len(self.engine.step())
        rate = done / (time.perf_counter() - begin)
        self.engine.abort_request(names, internal=True)
        return rate


def main() -> None:
    answer_jobs("vLLM", vllm.__version__, Engine(sys.argv[1]))


if __name__ == "__main__":
    main()
