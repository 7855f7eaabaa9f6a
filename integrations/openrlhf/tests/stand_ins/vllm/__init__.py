"""An engine with the interface that OpenRLHF uses of vLLM; transformers generates, on the CPU.

Requests that come at about the same time are generated as one batch. A pause cuts such a batch; it
goes on where it was cut, perhaps with other weights.
"""

import asyncio
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from openrlhf.utils.distributed_util import stateless_init_process_group
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

__version__ = "0.29.0"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = None
    min_tokens: int = 1
    skip_special_tokens: bool = False
    logprobs: int | None = None


@dataclass
class AsyncEngineArgs:
    model: str
    seed: int = 0
    settings: dict = field(default_factory=dict)

    def __init__(self, model, seed=0, **settings):
        self.model, self.seed, self.settings = model, seed, settings


class AsyncLLMEngine:
    # After so many tokens the next batch waits for a pause: so a test is sure of one there.
    halt_after = 0

    def __init__(self, arguments):
        torch.manual_seed(arguments.seed)
        self.model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.pending = []
        self.generating, self.running, self.paused = (
            threading.Lock(),
            threading.Event(),
            threading.Event(),
        )
        self.running.set()
        self.output_processor = SimpleNamespace(
            get_num_unfinished_requests=lambda: len(self.pending)
        )

    @classmethod
    def from_engine_args(cls, arguments):
        return cls(arguments)

    async def is_sleeping(self):
        return False

    async def generate(self, prompt, params, request_id):
        answer = asyncio.get_running_loop().create_future()
        self.pending.append((prompt["prompt_token_ids"], params, answer))
        if len(self.pending) == 1:
            self.task = asyncio.create_task(self._generate_pending())
        yield await answer

    async def _generate_pending(self):
        await asyncio.sleep(0.3)
        requests, self.pending = self.pending, []
        outputs = await asyncio.to_thread(self._generated, requests)
        for (*_, answer), output in zip(requests, outputs, strict=True):
            answer.set_result(SimpleNamespace(outputs=[output]))

    @torch.no_grad()
    def _generated(self, requests):
        params = requests[0][1]
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        width = max(len(ids) for ids, *_ in requests)
        rows = torch.tensor([[pad] * (width - len(ids)) + ids for ids, *_ in requests])
        logits, goes_on = [], True
        while goes_on:
            self.running.wait()
            left, halt = params.max_tokens - (rows.shape[1] - width), type(self).halt_after
            with self.generating:
                result = self.model.generate(
                    rows,
                    attention_mask=(rows != pad).long(),
                    do_sample=True,
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=0,
                    max_new_tokens=min(left, halt) if halt else left,
                    return_dict_in_generate=True,
                    output_logits=params.logprobs is not None,
                    disable_compile=True,
                    stopping_criteria=StoppingCriteriaList([self._is_paused]),
                )
            rows = result.sequences
            logits += result.logits or ()
            written = rows[:, width:]
            goes_on = written.shape[1] < params.max_tokens and not (written == eos).any(1).all()
            if halt:
                type(self).halt_after = 0
                self.paused.wait(120)
        outputs = []
        for row, ids in enumerate(written.tolist()):
            ended = eos in ids
            ids = ids[: ids.index(eos) + 1] if ended else ids
            log_probs = None
            if params.logprobs is not None:
                every = torch.stack([step[row] for step in logits[: len(ids)]])
                every = (every.float() / params.temperature).log_softmax(-1)
                log_probs = [
                    {token: SimpleNamespace(logprob=float(values[token]))}
                    for token, values in zip(ids, every, strict=True)
                ]
            outputs.append(
                SimpleNamespace(
                    token_ids=ids,
                    text=self.tokenizer.decode(ids),
                    finish_reason="stop" if ended else "length",
                    logprobs=log_probs,
                )
            )
        return outputs

    def _is_paused(self, ids, scores, **_):
        return torch.full((len(ids),), not self.running.is_set())

    async def pause_generation(self, mode):
        assert mode == "keep"
        self.running.clear()
        self.paused.set()
        await asyncio.to_thread(self.generating.acquire)  # until no batch is being generated

    async def resume_generation(self):
        self.generating.release()
        self.paused.clear()
        self.running.set()

    async def collective_rpc(self, method, args):
        return await asyncio.to_thread(getattr(self, f"_{method}"), *args)

    def _init_process_group(self, host, port, rank, world_size, name, backend, use_ray):
        self.updates = stateless_init_process_group(host, port, rank, world_size, "cpu")

    def _update_weight(self, name, dtype, shape, empty_cache):
        weight = torch.empty(tuple(shape), dtype=dtype)
        self.updates.broadcast(weight, src=0, stream=None)
        with torch.no_grad():
            self.model.get_parameter(name).copy_(weight)
