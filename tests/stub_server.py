"""A server that speaks vLLM's and SGLang's dialects as far as server_engine.py does, with our own
engine behind it, and with faults to choose from.

    python tests/stub_server.py vllm 8000 nano
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

from context import Chat, Trajectory
from data.task import Task
from engine import Engine, Slot, load_policy
from rollout import RolloutArgs
from tools import signatures


class Stub:
    """One server. `fault` names what is wrong with it, "" if nothing is."""

    def __init__(self, dialect: str, port: int = 0, policy: str = "nano"):
        self.model, self.tokenizer = load_policy(policy)
        args = RolloutArgs(slots=64, max_context=2000)
        self.engine = Engine(self.model, Chat(self.tokenizer, signatures()), args)
        self.dialect, self.version, self.fault = dialect, "default", ""
        self.lock, self.aborted, self.loads = threading.RLock(), set(), 0
        handler = type("Handler", (Handler,), {"stub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def play(self, prompt: list[int], limit: int, stop: list[int], temperature: float, seed: int):
        """(ids, log-probs, how it ended) of one sample; whoever waits steps the engine for all."""
        slot = Slot(Trajectory(Task("t", "q", "a"), (seed,)))
        engine = self.engine
        with self.lock:
            engine.end_id, engine.max_new_tokens, engine.temperature = stop[0], limit, temperature
            place = engine.free_places()[0]
            engine.slots[place] = slot
            engine.start_turn(slot, prompt)
        while not slot.turn_done:
            time.sleep(0.001 if self.fault == "frozen" else 0)  # until the next load
            with self.lock:
                if self.fault != "frozen" and not slot.turn_done:
                    engine.step()
        with self.lock:
            engine.slots[place] = None
            logprobs = self.raw(prompt, slot.ids) if self.fault == "raw" else slot.logprobs
            end = "abort" if slot in self.aborted else "length"
            return slot.ids, logprobs, "stop" if slot.ids[-1:] == stop else end

    @torch.no_grad()
    def raw(self, prompt: list[int], ids: list[int]) -> list[float]:
        logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()

    def abort(self) -> None:
        with self.lock:
            for slot in self.engine.slots:
                if slot and not slot.turn_done:
                    slot.turn_done = True
                    self.aborted.add(slot)

    def load(self, folder: str, name: str | None = None) -> None:
        with self.lock:
            self.loads += 1
            self.fault = "" if self.fault == "frozen" else self.fault
            if self.fault != "stale":
                self.model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
            self.engine.new_weights(0)
            self.version = name or self.version

    def answer(self, path: str, body: dict):
        """The JSON of an answer; LookupError: there is no such address."""
        if path == "/v1/models":
            window = 100 if self.fault == "short" else 2000
            return {"data": [{"id": "m", "owned_by": self.dialect, "max_model_len": window}]}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False).input_ids
            return {"tokens": ids[::-1] if self.fault == "tokenizer" else ids}
        return {"vllm": self.vllm, "sglang": self.sglang}[self.dialect](path, body)

    def vllm(self, path: str, body: dict):
        if path == "/v1/completions":
            sampling = (body["temperature"], body["seed"])
            ids, logprobs, end = self.play(
                body["prompt"], body["max_tokens"], body["stop_token_ids"], *sampling
            )
            why = ids[-1] if end == "stop" else None
            ids = ids[:-1] if self.fault == "no end" else ids
            shape = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs[: len(ids)]}}
            return {"choices": [shape | {"finish_reason": end, "stop_reason": why}]}
        if self.fault == "dev off":
            raise LookupError
        if path == "/pause?mode=abort":
            self.abort()
        elif path == "/collective_rpc":
            self.load(body["kwargs"]["weights_path"])
        elif path == "/update_weight_version":
            self.version = "default" if self.fault == "no version" else body["new_version"]
        elif path == "/weight_info":
            return {"weight_version": self.version}
        elif path not in ("/resume", "/reset_prefix_cache"):
            raise LookupError
        return {}

    def sglang(self, path: str, body: dict):
        if path == "/generate":
            sampling = body["sampling_params"]
            ids, logprobs, end = self.play(
                body["input_ids"],
                sampling["max_new_tokens"],
                sampling["stop_token_ids"],
                sampling["temperature"],
                sampling["sampling_seed"],
            )
            reason = {"type": end} | ({"matched": ids[-1]} if end == "stop" else {})
            triples = [[p, i, None] for p, i in zip(logprobs, ids)]
            return {"meta_info": {"output_token_logprobs": triples, "finish_reason": reason}}
        if path == "/update_weights_from_disk":
            self.abort()
            self.load(body["model_path"], body["weight_version"])
            return {"success": True}
        if path != "/get_weight_version":  # an older one: it has no /model_info
            raise LookupError
        return {"weight_version": self.version}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code = 200
        try:
            text = json.dumps(self.stub.answer(self.path, json.loads(data or "{}")))
        except LookupError:
            code, text = 404, "{}"
        except Exception as error:
            code, text = 500, f"{type(error).__name__}: {error}"
        self.send_response(code)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST

    def log_message(self, *_) -> None:
        pass


def serve(dialect: str, port: int, *policy: str) -> None:
    torch.set_num_threads(1)
    Stub(dialect, port, *policy).http.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
