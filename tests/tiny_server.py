"A small server with the completions form of OpenAI's interface, around a tiny model."
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import torch
from transformers import AutoModelForCausalLM

from po_book.sampling import sample


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = self.server.owner.answer(self.path, body, self.headers)
        if told is None:  # it dies in the middle
            self.close_connection = True
            self.connection.close()
            return
        status, text = told
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


class TinyServer:
    """Serves a copy of a model until `stop`; `start` begins anew at the same address.

    It keeps what it was asked in `asked`. `failures` are given instead of the next answers: a
    status, or None for a connection that breaks off. `change` changes an answer's choices.
    """

    def __init__(self, model, tokenizer, change: Callable[[list[dict]], object] | None = None):
        self.model, self.tokenizer, self.change = model, tokenizer, change
        self.lock, self.asked, self.failures, self.port = Lock(), [], [], 0
        self.prepare = lambda path, body: None  # called before each answer
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.owner, self.port = self, self.http.server_port
        Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict, headers) -> tuple[int, bytes] | None:
        with self.lock:
            self.asked.append((path, body, headers.get("Authorization")))
            self.prepare(path, body)
            if self.failures:
                status = self.failures.pop(0)
                return status and (status, b"not now")
            if path == "/v1/completions":
                return self.completions(body)
            if path == "/update_weights_from_disk":
                return self.load(body["model_path"])
            if path == "/collective_rpc":
                return self.load(body["kwargs"]["weights_path"])
            return (200, b"") if path == "/reset_prefix_cache" else (404, b"no such place")

    def load(self, folder: str) -> tuple[int, bytes]:
        try:
            new = AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError) as error:
            return 200, json.dumps({"success": False, "message": str(error)}).encode()
        self.model.load_state_dict(new.state_dict())
        return 200, b'{"success": true}'

    def completions(self, body: dict) -> tuple[int, bytes]:
        if body["model"] != "tiny":
            return 404, b"The model does not exist."
        law = {"temperature": body["temperature"], "top_p": body["top_p"], "min_p": body["min_p"],
               "top_k": None if body["top_k"] == -1 else body["top_k"]}
        draws = torch.Generator().manual_seed(body["seed"])
        rows = sample(
            self.model, self.tokenizer, [body["prompt"]], body["n"], body["max_tokens"],
            **law, generator=draws, stop=body["stop"],
        )
        choices = [
            {
                "index": i,
                "text": text,
                "token_ids": ids[mask].tolist(),
                "logprobs": {"token_logprobs": logps[mask].tolist()},
                "finish_reason": "stop" if finished else "length",
            }
            for i, (ids, mask, logps, finished, text) in enumerate(zip(
                rows.ids, rows.mask, rows.logps, rows.finished, rows.texts(self.tokenizer)
            ))
        ]
        if self.change is not None:
            self.change(choices)
        return 200, json.dumps({"choices": choices[::-1]}).encode()  # in any order
