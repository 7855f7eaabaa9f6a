"""A rollout for VeRL on CPUs: transformers' `generate` behind the interface of its servers.

Registered as `transformers`. Requests that arrive together are generated together.
"""

import asyncio
import os

import ray
import torch
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "transformers_server_{}"


@ray.remote(num_cpus=0)
class Server:
    def __init__(self, path):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.global_steps, self.waiting, self.task = None, [], None

    async def generate(self, prompt_ids, sampling_params, request_id, **options):
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt_ids, sampling_params, answer))
        if self.task is None:
            self.task = asyncio.create_task(self._generate())
        return await answer

    async def _generate(self):
        count = 0
        while count < len(self.waiting):  # until no more requests arrive
            count = len(self.waiting)
            await asyncio.sleep(0.2)
        requests, self.waiting, self.task = self.waiting, [], None
        width = max(len(prompt) for prompt, _, _ in requests)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p, _, _ in requests])
        places = torch.arange(width)
        mask = torch.stack([(places >= width - len(p)).long() for p, _, _ in requests])
        options = requests[0][1]
        torch.manual_seed(self.global_steps or 0)
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=options.get("temperature", 1.0),
                top_p=options.get("top_p", 1.0),
                top_k=0,
                max_new_tokens=46,
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = made.sequences[:, width:]
        # Of the distribution that was sampled from, as the servers of VeRL have them.
        scores = torch.stack(made.scores, 1).log_softmax(-1)
        log_probs = scores.gather(-1, tokens[..., None])[..., 0].tolist()
        for (_, _, answer), row, found in zip(requests, tokens.tolist(), log_probs, strict=True):
            response = row[: row.index(1) + 1] if 1 in row else row
            answer.set_result(
                TokenOutput(
                    token_ids=response,
                    log_probs=found[: len(response)] if options.get("logprobs") else None,
                    stop_reason="completed",
                    extra_fields={"global_steps": self.global_steps},
                )
            )

    async def load(self, weights, global_steps):
        self.model.load_state_dict(weights, strict=False)
        self.global_steps = global_steps

    async def nothing(self, *args, **kwargs):
        pass

    wake_up = sleep = abort_all_requests = resume_generation = nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    async def launch_servers(self):
        name = NAME.format(self.replica_rank)
        self.servers = [
            Server.options(name=name, max_concurrency=1000).remote(self.model_config.path)
        ]
        self._server_handle, self._server_address = self.servers[0], f"cpu:{self.replica_rank}"


class Adapter(BaseRollout):
    """What sits in a training worker: it hands the weights on to the worker's own server."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **options):
        # Every rank takes part in gathering the weights.
        whole = {name: tensor.detach().cpu().clone() for name, tensor in weights}
        server = ray.get_actor(NAME.format(os.environ["RANK"]))
        await server.load.remote(whole, global_steps)


def register():
    _ROLLOUT_REGISTRY[("transformers", "async")] = f"{__name__}.Adapter"
    RolloutReplicaRegistry.register("transformers", lambda: Replica)
