"""A rollout for VeRL on CPUs: transformers' `generate` behind the interface of its servers.

Registered as `transformers`. Requests that arrive together are generated together. Weights reach a
server beside the trainer over gloo, which is registered as a checkpoint engine of that name.
"""

import asyncio
import io
import itertools
import os
from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.net_utils import get_free_port
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

NAME = "transformers_server_{}"
MOST = 46
EOS, ASKED = 1, 41  # of the embedded policy: the ends of a response and of a problem


@ray.remote(num_cpus=0)
class Server:
    """Generates for agent loops.

    An asynchronous trainer aborts what is unfinished. To have something of the kind whatever the
    speed, `whole` first turns are answered at once, and every later one is held in its middle for
    an abort, or for some seconds. What was aborted comes again, and is continued.
    """

    def __init__(self, path, whole):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.global_steps, self.waiting, self.task = None, [], None
        self.whole, self.held, self.rejects = whole, [], False
        self.running, self.aborted = asyncio.Event(), asyncio.Event()
        self.running.set()

    async def generate(self, prompt_ids, sampling_params, request_id, **options):
        if self.rejects:
            return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted")
        await self.running.wait()
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

        def temperature(request):
            return request[1].get("temperature", 1.0)

        for _, alike in itertools.groupby(sorted(requests, key=temperature), key=temperature):
            self._answer(list(alike))

    def _answer(self, requests):
        width = max(len(prompt) for prompt, _, _ in requests)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p, _, _ in requests])
        places = torch.arange(width)
        mask = torch.stack([(places >= width - len(p)).long() for p, _, _ in requests])
        options = requests[0][1]
        sampled = {"do_sample": False}
        if temperature := options.get("temperature", 1.0):
            top_p = options.get("top_p", 1.0)
            sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(self.global_steps or 0)
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                **sampled,
                max_new_tokens=MOST,
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = made.sequences[:, width:]
        # Of the distribution that was sampled from, as the servers of VeRL have them.
        scores = torch.stack(made.scores, 1).log_softmax(-1)
        log_probs = scores.gather(-1, tokens[..., None])[..., 0].tolist()
        for (prompt, _, answer), row, found in zip(
            requests, tokens.tolist(), log_probs, strict=True
        ):
            response = row[: row.index(EOS) + 1] if EOS in row else row
            found = found[: len(response)] if options.get("logprobs") else None
            # Neither a later turn, nor what goes on after an abort.
            if temperature and EOS not in prompt and prompt[-1] == ASKED:
                self.whole -= 1
                if self.whole < 0:
                    self.held.append(asyncio.create_task(self._held(answer, response, found)))
                    continue
            answer.set_result(self._output(response, found, "completed"))

    def _output(self, response, log_probs, reason):
        return TokenOutput(
            token_ids=response,
            log_probs=log_probs,
            stop_reason=reason,
            extra_fields={"global_steps": self.global_steps},
        )

    async def _held(self, answer, response, log_probs):
        whole = self._output(response, log_probs, "completed")
        half = len(response) // 2
        part = self._output(response[:half], log_probs and log_probs[:half], "aborted")
        try:
            await asyncio.wait_for(self.aborted.wait(), 4)
            answer.set_result(part)
        except TimeoutError:
            answer.set_result(whole)

    async def abort_all_requests(self, reject_request=False):
        self.rejects = reject_request
        self.running.clear()
        self.aborted.set()

    async def resume_generation(self):
        self.rejects = False
        self.aborted.clear()
        self.running.set()

    async def load(self, weights, global_steps):
        self.model.load_state_dict(weights, strict=False)
        self.global_steps = global_steps

    async def nothing(self, *args, **kwargs):
        pass

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    async def launch_servers(self):
        name = NAME.format(self.replica_rank)
        self.servers = [
            Server.options(name=name, max_concurrency=1000).remote(
                self.model_config.path, self.config.max_num_seqs
            )
        ]
        self._server_handle, self._server_address = self.servers[0], f"cpu:{self.replica_rank}"


class Adapter(BaseRollout):
    """What sits in a training worker, or in one beside it: it hands weights on to its server."""

    def __init__(self, config, model_config, device_mesh, replica_rank=None):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = os.environ["RANK"] if replica_rank is None else replica_rank

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **options):
        # Every rank takes part in gathering the weights.
        whole = {
            name: tensor.detach().cpu().clone()
            async for name, tensor in ensure_async_iterator(weights)
        }
        server = ray.get_actor(NAME.format(self.replica_rank))
        await server.load.remote(whole, global_steps)


class GlooCheckpointEngine(CheckpointEngine):
    """Weights go from the trainer's first rank to the workers beside it, in one broadcast."""

    def __init__(self, bucket_size, is_master=False):
        self.is_master, self.group = is_master, None

    def prepare(self):
        return ("127.0.0.1", get_free_port("127.0.0.1")[0]) if self.is_master else None

    @classmethod
    def build_topology(cls, actor_wg_world_size, rollout_world_size, metadata):
        size = 1 + rollout_world_size

        def alike(count):
            return {"world_size": [size] * count, "place": [metadata[0]] * count}

        senders = [0] + [-1] * (actor_wg_world_size - 1)
        return (
            {"rank": senders, **alike(actor_wg_world_size)},
            {"rank": list(range(1, size)), **alike(rollout_world_size)},
        )

    def init_process_group(self, rank, world_size, place):
        if rank >= 0:
            wait = timedelta(seconds=120)
            store = dist.TCPStore(*place, world_size, is_master=rank == 0, timeout=wait)
            self.group = dist.ProcessGroupGloo(store, rank, world_size, wait)

    def finalize(self):
        self.group = None

    def _broadcast(self, tensor):
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([tensor], options).wait()
        return tensor

    async def send_weights(self, weights, global_steps=None):
        whole = {name: tensor.detach().cpu().clone() for name, tensor in weights}
        if self.group is not None:
            stream = io.BytesIO()
            torch.save(whole, stream)
            self._broadcast(torch.tensor(stream.tell()))
            self._broadcast(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8))

    async def receive_weights(self, global_steps=None):
        size = int(self._broadcast(torch.tensor(0)))
        stream = self._broadcast(torch.empty(size, dtype=torch.uint8))
        for pair in torch.load(io.BytesIO(stream.numpy().tobytes())).items():
            yield pair


def register():
    _ROLLOUT_REGISTRY[("transformers", "async")] = f"{__name__}.Adapter"
    RolloutReplicaRegistry.register("transformers", lambda: Replica)
    CheckpointEngineRegistry.register("gloo")(GlooCheckpointEngine)
