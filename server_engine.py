"""Rollouts on a running vLLM or SGLang server (`--engine URL`), in the place of engine.py.

    trainer, rank 0                          each process that plays
    ---------------                          -----------------------
    no turn is in flight anywhere
    weights into a new folder, renamed       a turn is one request: token ids in, ids and log-probs
    server: load it, under a new name        out; then the server is asked what it has loaded
    the name is asked back                   the name has changed meanwhile: the turn is repeated
    a few log-probs are compared             the server is gone: wait, load the folder, repeat

A name is the folder and a number drawn for each load. So a server that was restarted between two
looks shows it, whoever has given it the weights again, and a turn of two versions is never used.
A turn has the seed of its trajectory and number: repeated by the same weights it is the same turn.

In: a model, prompts. Out: what `engine.Engine` gives to `AgentLoop`. The two dialects are plain
classes of three calls: `generate`, `load`, `loaded`. To try another server, write one more.
"""

import concurrent.futures
import fcntl
import shutil
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import requests
import torch
from accelerate.utils import broadcast_object_list, wait_for_everyone

from context import Chat
from engine import Engine, Slot, WorkerError, check_finite
from support import endings, run_folder
from support.processes import own_rank
from support.shards import gathered, reshard
from support.threads import in_thread

WAIT_S = 600.0  # a server that is gone must be back after so many seconds
PAUSE_S = 0.5  # between two looks at it
REQUEST_S = 600.0  # a request without an answer has failed
STEP_S = 0.005  # the longest that `step` waits for a turn to end
EXACT = 1e-4  # mean gap to our log-probs, below which the server works in float32, as we do
ROUGH = 0.1  # the same where it rounds; a larger gap means other weights
SAMPLE = ('Who wrote "The Lamp"?', "naïve café, 北京 and 12,345.6", "def f(x):\n\treturn x[1:]\n")


class EngineError(WorkerError, ValueError):
    """The server cannot be used; the message is one line. Before a run begins it is a wrong flag,
    hence the ValueError.
    """


def call(url: str, body: dict | None = None, hint: str = "") -> requests.Response:
    """The answer to a GET, or to a POST of `body`.

    Args:
        hint: what to do if the server has no such address.

    Raises:
        requests.RequestException: the server is gone or fails, and may recover.
        EngineError: it refuses the request.
    """
    method = "GET" if body is None else "POST"
    reply = requests.request(method, url, json=body, timeout=(10, REQUEST_S))
    if reply.status_code == 404 and hint:
        raise EngineError(f"the engine has no {url}: {hint}")
    if 400 <= reply.status_code < 500 and reply.status_code not in (408, 429):
        words = " ".join(reply.text.split())[:300]
        raise EngineError(f"{url} refuses a request ({reply.status_code}): {words}")
    reply.raise_for_status()
    return reply


class Vllm:
    """vLLM's dialect."""

    hint = "start vLLM (0.32 or newer) with VLLM_SERVER_DEV_MODE=1"

    def __init__(self, url: str, model: str):
        self.url, self.model = url, model

    def loaded(self) -> str:
        """The name under which its weights were loaded; another text if they are not ours."""
        return call(f"{self.url}/weight_info", None, self.hint).json()["weight_version"]

    def load(self, folder: Path, name: str) -> None:
        """Load weights. What is in flight is aborted, and the name says so from the first to the
        last moment.
        """
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        call(f"{self.url}/update_weight_version", {"new_version": "loading"}, self.hint)
        call(f"{self.url}/pause?mode=abort", {}, self.hint)
        call(f"{self.url}/collective_rpc", reload, self.hint)
        if "false" in call(f"{self.url}/reset_prefix_cache", {}, self.hint).text:
            raise requests.RequestException("its prefix cache cannot be reset")
        call(f"{self.url}/resume", {}, self.hint)
        call(f"{self.url}/update_weight_version", {"new_version": name}, self.hint)

    def generate(self, prompt: list[int], limit: int, end_id: int, temperature: float, seed: int):
        """(ids, log-probs, how it ended, the token that ended it) of one sample."""
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
        stop = {"max_tokens": limit, "stop_token_ids": [end_id], "ignore_eos": True}
        shape = {"model": self.model, "prompt": prompt, "logprobs": 0, "return_token_ids": True}
        answer = call(f"{self.url}/v1/completions", shape | sampling | stop | {"seed": seed})
        choice = answer.json()["choices"][0]
        logprobs = choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        return choice["token_ids"], logprobs, choice["finish_reason"], choice["stop_reason"]


class Sglang:
    """SGLang's dialect."""

    hint = "SGLang 0.5.3 or newer is needed"

    def __init__(self, url: str, model: str):
        self.url, self.model = url, model

    def loaded(self) -> str:
        try:
            answer = call(f"{self.url}/model_info", None, self.hint)
        except EngineError:  # an older one
            answer = call(f"{self.url}/get_weight_version", None, self.hint)
        return str(answer.json()["weight_version"])

    def load(self, folder: Path, name: str) -> None:
        body = {"model_path": str(folder), "weight_version": name, "flush_cache": True}
        call(f"{self.url}/update_weights_from_disk", body | {"abort_all_requests": True}, self.hint)

    def generate(self, prompt: list[int], limit: int, end_id: int, temperature: float, seed: int):
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "sampling_seed": seed}
        stop = {"max_new_tokens": limit, "stop_token_ids": [end_id]}
        body = {"input_ids": prompt, "sampling_params": sampling | stop, "return_logprob": True}
        about = call(f"{self.url}/generate", body).json()["meta_info"]
        pairs, end = about["output_token_logprobs"], about["finish_reason"]
        return [p[1] for p in pairs], [p[0] for p in pairs], end["type"], end.get("matched")


def open_server(url: str, max_context: int) -> Vllm | Sglang:
    """Ask a server which one it is.

    Raises:
        requests.RequestException: it does not answer.
        EngineError: it is neither, or its window is too small.
    """
    url = url.rstrip("/").removesuffix("/v1")
    hint = "give the base URL of a vLLM or SGLang server, such as http://127.0.0.1:8000"
    try:
        card = call(f"{url}/v1/models", None, hint).json()["data"][0]
        dialect = {"vllm": Vllm, "sglang": Sglang}[card["owned_by"]]
    except (LookupError, TypeError, requests.JSONDecodeError):
        raise EngineError(f"--engine {url}: {hint}") from None
    if (there := card.get("max_model_len") or max_context) < max_context:
        raise EngineError(f"the engine's window is {there} tokens: --max_context {there} would do")
    return dialect(url, card["id"])


def open_engine(model, chat: Chat, args, version: int = 0):
    """What plays: `Engine`, or with --engine a server, which then has the model's weights, of this
    version.
    """
    kind = ServerEngine if args.engine else Engine
    return kind(model, chat, args, version)


class ServerEngine:
    """Decodes on a server; to `AgentLoop` it looks like an `Engine`.

    Args:
        model: the learner's. A process that only plays gives an empty module: it waits for the
            version that the trainer has pushed.
        chat: its template. `chat.end_id` ends a turn.
        args: `RolloutArgs`; engine, engine_weights, slots, max_context, max_new_tokens and
            temperature are read.
        version: of the model's weights.

    Raises:
        EngineError: the server does not answer, or cannot be used for this model.
    """

    def __init__(self, model, chat: Chat, args, version: int = 0):
        self.model, self.chat, self.args, self.end_id = model, chat, args, chat.end_id
        self.slots: list[Slot | None] = [None] * args.slots
        self.turns: dict[Slot, concurrent.futures.Future] = {}  # in flight
        self.version = version
        self.loaded = ""  # the name of what the server has, "" if not known
        self.stats = {"idle_s": 0.0, "sampled": 0}
        self.folder, self.server = Path(args.engine_weights).absolute(), None
        self.one_at_a_time = threading.Lock()
        self.most_gap = ROUGH
        self.pushes = next(model.parameters(), None) is not None
        if self.pushes:
            try:
                self.server = open_server(args.engine, args.max_context)
                self.server.loaded()
                self.check_tokenizer()
            except requests.RequestException as error:
                words = f"--engine {args.engine} does not answer: {cause(error)}"
                raise EngineError(words) from None
            if own_rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                run_folder.lock(self.folder)  # until this process ends
            self.new_weights(version)

    # What `AgentLoop` asks for.

    free_places = Engine.free_places  # it looks at `slots` alone

    def at_boundary(self) -> bool:
        """Whether no slot is in the middle of a turn."""
        return not self.turns

    def start_turn(self, slot: Slot, prompt: list[int]) -> None:
        """Send a prompt of a slot that is in `slots`."""
        key = [*slot.trajectory.key, len(slot.trajectory.turns)]
        seed = int(np.random.default_rng(key).integers(2**31))
        self.turns[slot] = in_thread(self.turn, prompt, seed)

    def step(self) -> list[Slot]:
        """Wait a moment; returns the slots whose turn has ended."""
        concurrent.futures.wait(self.turns.values(), STEP_S, "FIRST_COMPLETED")
        ended = [slot for slot, turn in self.turns.items() if turn.done()]
        for slot in ended:
            slot.ids, slot.logprobs, slot.began = self.turns.pop(slot).result()
            self.stats["sampled"] += len(slot.ids)
        return ended

    def new_weights(self, version: int) -> None:
        """The weights have changed. Call it on all ranks, when no process has a turn in flight:
        rank 0 pushes them.

        Raises:
            EngineError: the server does not take them.
            OSError: they cannot be written.
        """
        self.version, self.loaded = version, ""
        if self.pushes:
            wait_for_everyone()
            self.push()
            wait_for_everyone()

    # Turns.

    def turn(self, prompt: list[int], seed: int) -> tuple[list[int], list[float], float]:
        """(ids, log-probs, when its request was sent) of a turn that one version of the weights has
        sampled. It is requested until it is one.
        """
        failed, why = None, ""
        while failed is None or time.monotonic() < failed + WAIT_S:
            endings.check()
            loaded = self.loaded or self.bring_back()
            began = time.perf_counter()
            try:
                ids, logprobs, end, ended_by = self.server.generate(
                    prompt, self.args.max_new_tokens, self.end_id, self.args.temperature, seed
                )
                if end in ("stop", "length") and self.server.loaded() == loaded:
                    self.check_turn(ids, logprobs, ended_by)
                    return ids, logprobs, began
                why = "its weights changed in the middle of a turn"
            except requests.RequestException as error:
                why = cause(error)
            except (LookupError, TypeError) as error:
                why = f"{type(error).__name__}: {error} in its answer"
            if self.loaded == loaded:
                self.loaded = ""
            failed = failed or time.monotonic()
            time.sleep(PAUSE_S)
        raise EngineError(f"the engine {self.args.engine} gave no turn for {WAIT_S:g} s: {why}")

    def check_turn(self, ids: list[int], logprobs: list[float], ended_by) -> None:
        if not ids or len(ids) != len(logprobs) or None in logprobs:
            raise EngineError(
                f"the engine gave {len(ids)} tokens and {len(logprobs)} log-probs of a turn"
            )
        if ended_by == self.end_id and ids[-1] != self.end_id:
            raise EngineError("the engine leaves the token out that ends a turn")

    # Weights.

    def bring_back(self, name: str = "") -> str:
        """See to it that the server has this version, and wait for one that does not answer.

        Args:
            name: load the weights now, under this name; "": whatever name of this version will do.

        Returns:
            The name under which it has them.
        """
        said, failures = False, 0
        with self.one_at_a_time, open(self.folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other processes load, too
            deadline = time.monotonic() + WAIT_S
            while name or not self.loaded:  # else another thread was faster
                endings.check()
                try:
                    self.loaded = self.load(name)
                    break
                except requests.RequestException as error:
                    why = cause(error)
                    failures += why.startswith("500")  # it is there, and cannot do it
                if failures == 3 or time.monotonic() > deadline:
                    raise EngineError(f"the engine {self.args.engine} fails: {why}")
                if not said:
                    said = True
                    words = f"is not ready ({why}): waiting for it, at most {WAIT_S:g} s"
                    print(f"the engine {self.args.engine} {words}", file=sys.stderr, flush=True)
                time.sleep(PAUSE_S)
            return self.loaded

    def load(self, name: str) -> str:
        """Let the server load this version, if it has not; returns the name that it says."""
        folder = self.weights_of(self.version)
        self.server = self.server or open_server(self.args.engine, self.args.max_context)
        there = self.server.loaded()
        if name or not there.startswith(f"{folder}#"):
            self.server.load(folder, name or name_of(folder))
            there = self.server.loaded()
        if not there.startswith(name or f"{folder}#"):
            raise EngineError(f"the engine did not take {folder}: it has {there!r}")
        return there

    def weights_of(self, version: int) -> Path:
        return self.folder / f"version-{version:06d}"

    def push(self) -> None:
        """Write the weights, let the server load them, and hold it to them. Rank 0 does it; a
        sharded model is gathered, and computes, on all ranks together.
        """
        prompt, ids, logprobs = self.chat.before_question, [], []
        weights = gathered(self.model.state_dict(keep_vars=True))
        if own_rank() == 0:
            check_finite(weights.values(), self.version)
            folder = self.weights_of(self.version)
            with run_folder.save_atomically(folder) as temporary:
                self.model.save_pretrained(temporary, state_dict=weights)
            self.bring_back(name_of(folder))
            ids, logprobs, _ = self.turn(prompt, self.version)
        del weights
        [ids] = broadcast_object_list([ids])
        self.check_logprobs(prompt, ids, logprobs)
        for old in self.folder.glob("version-*") if own_rank() == 0 else []:
            if old != folder:
                shutil.rmtree(old)

    # Is it the same model?

    def check_tokenizer(self) -> None:
        """Raise EngineError if the server's tokenizer gives other ids, where it has one to ask."""
        for text in (*SAMPLE, self.chat.around_question[0]):
            body = {"model": self.server.model, "prompt": text, "add_special_tokens": False}
            try:
                there = call(f"{self.server.url}/tokenize", body).json()["tokens"]
            except (EngineError, LookupError):
                return
            ours = self.chat.tokenizer(text, add_special_tokens=False).input_ids
            if there != ours:
                raise EngineError(
                    f"the engine {self.args.engine} has another tokenizer than --model: "
                    f"start it with the same model"
                )

    @torch.no_grad()
    def check_logprobs(self, prompt: list[int], ids: list[int], logprobs: list[float]) -> None:
        """Compare the log-probs of a few sampled tokens with our own, on rank 0.

        Raises:
            EngineError: they are not of these weights, or of another distribution.
        """
        known = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= known:
            raise EngineError(f"the engine sampled token {max(ids)}, and the model knows {known}")
        row = torch.tensor([prompt + ids], device=self.model.device)  # (1, L)
        logits = self.model(input_ids=row[:, :-1], use_cache=False).logits[0, -len(ids) :].float()
        reshard(self.model)
        if own_rank():
            return
        gaps = []
        for temperature in (self.args.temperature or 1.0, 1.0):
            ours = (logits / temperature).log_softmax(-1).gather(-1, row[0, -len(ids) :, None])
            gaps.append(float((ours[:, 0].cpu() - torch.tensor(logprobs)).abs().mean()))
        gap, before = gaps
        if gap > 1e-3 and gap > 2 * before:
            raise EngineError(
                "the engine gives log-probs before temperature: "
                "start vLLM with --logprobs-mode processed_logprobs"
            )
        if not gap < self.most_gap:
            raise EngineError(
                f"the engine says that it has version {self.version}, but its log-probs are those "
                f"of other weights or of another model (they differ by {gap:.2g} a token)"
            )
        if gap < EXACT:  # this server is exact, so later pushes must be
            self.most_gap = 10 * EXACT


def name_of(folder: Path) -> str:
    """A name for the weights of a folder, new for each load."""
    return f"{folder}#{uuid.uuid4().hex[:8]}"


def cause(error: Exception) -> str:
    """An error of a request in a few words."""
    if isinstance(error, requests.HTTPError):
        return f"{error.response.status_code} {' '.join(error.response.text.split())[:200]}"
    reason = getattr(error.args[0], "reason", error.args[0]) if error.args else error
    return str(reason).rpartition(": ")[2][:200] or type(error).__name__
