"""Texts from OpenAI-compatible servers (vLLM, SGLang, llama.cpp, `transformers serve`): what the
three captioning stages import for --server.

    vllm serve huggyllama/llama-7b --port 8000
    python rewrite_llama.py ...the usual arguments... --server http://node1:8000 http://node2:8000

--model is the server's name of the model, --batch-size the number of requests at a time for each
server; OPENAI_API_KEY is sent if it is set. The official client repeats what may pass (no
connection, 429, 5xx) and waits as long as the server's Retry-After says. What happens then:

    400, 413, 422, a content filter   the row's error; the end if a harmless request fails, too
    any other status, an "error" with status 200, no answer after the client's retries   the end

The end is one line, and nothing is lost: the same command goes on. A second run may give other
texts. The tokenizer is not here, so what looks like a special token is cut from the data's texts,
a token counts as four bytes, and the server alone limits the length of captions and prompts.
"""
import base64
import io
import ipaddress
import itertools
import json
import os
import re
import socket
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

from PIL import Image

from data.common import die

try:
    import openai
except ImportError as e:
    die(f"--server needs a package: pip install -r data/requirements.txt ({e})")

RETRIES = 8  # with pauses of 0.5, 1, 2, 4, 8, 8, ... seconds
TIMEOUT = 600  # seconds for a text
MAX_SIDE = 1024  # pixels: a larger image takes longer, and gateways refuse it
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}  # the four servers know it
CUT, REFUSED = "cut at --max-new-tokens", "refused by the server"
SPECIAL = re.compile(r"<[|\uff5c]\S*?[|\uff5c]>|<</?\w+>>|</?\w+>|"
                     r"\[/?(?:INST|IMG\w*|SYSTEM_PROMPT|TOOL\w*|AVAILABLE_TOOLS|g?MASK|CLS)\]")


class Server:
    """complete, caption, answer: what the stages' models do. Each gives [(answer, None) or (None,
    reason)]. counts: a Counter, which is told how many answers were cut."""

    def __init__(self, args, counts, read_image=None):
        self.args, self.counts, self.read_image = args, counts, read_image
        self.turns = itertools.cycle([self.connect(url) for url in args.server])
        self.threads = ThreadPool(args.batch_size * len(args.server))

    def connect(self, url):
        if not url.startswith(("http://", "https://")):
            die(f"--server {url}: expected http://HOST:PORT")
        return openai.OpenAI(
            base_url=url.rstrip("/").removesuffix("/v1") + "/v1", max_retries=RETRIES,
            timeout=TIMEOUT, api_key=os.environ.get("OPENAI_API_KEY") or "none",
            http_client=openai.DefaultHttpxClient(trust_env=not is_local(url)))  # its proxies

    def complete(self, prompt, captions, uniform):
        """rewrite_llama.py: the end of each caption's line"""
        seeds = (uniform[:, 0] * 2 ** 24).astype(int).tolist()
        return self.ask_all(lambda text: self.ask(
            prompt=f"{prompt}{plain(text[0])} =>", seed=text[1], stop=["\n", "=>"],
            temperature=self.args.temperature, top_p=self.args.top_p),
            zip(captions, seeds), harmless=("a photo of a dog", 0))

    def answer(self, prompts):
        """fuse_vicuna.py: greedy answers to whole prompts"""
        stop = {"stop": ["\n"]} if self.args.format == "pairs" else {}
        return self.ask_all(
            lambda prompt: self.ask(prompt=plain(prompt), temperature=0, **stop), prompts,
            harmless="a photo of a dog")

    def cut(self, text):
        """fuse_vicuna.py: the text, or about its first --max-alt-tokens tokens"""
        return text.encode()[:4 * self.args.max_alt_tokens].decode(errors="ignore").strip()

    def caption(self, names):
        """caption_llava.py: read_image(root, name) -> (RGB image, None) or (None, reason)"""
        def ask(name):
            root = self.args.image_root
            image, reason = (name, None) if name is harmless else self.read_image(root, name)
            if reason:
                return None, reason
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            image.save(data := io.BytesIO(), "JPEG", quality=90, subsampling=0)
            url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}},
                       {"type": "text", "text": self.args.prompt}]
            return self.ask(messages=[{"role": "user", "content": content}], temperature=0,
                            extra_body=NO_THOUGHTS)
        harmless = Image.new("RGB", (64, 64))
        return self.ask_all(ask, names, harmless)

    def ask_all(self, ask, items, harmless):
        """[ask(item)], many at a time. If all are refused, a harmless one shows why."""
        refused = lambda answer: (answer[1] or "").startswith(REFUSED)
        try:
            answers = list(self.threads.imap(ask, items))
            if answers and all(map(refused, answers)) and refused(ask(harmless)):
                raise ValueError(f"all {len(answers)}, and a harmless one, are {answers[0][1]}")
        except (openai.OpenAIError, ValueError) as e:
            die(f"--server {' '.join(self.args.server)}: {e} {e.__cause__ or ''}. Nothing is lost: "
                "the same command goes on from here")
        self.counts[CUT] += sum(reason == CUT for _, reason in answers)
        return [(text, None if reason == CUT else reason) for text, reason in answers]

    def ask(self, **request):
        """One request to the next server -> (answer, None or CUT), or (None, why it is refused)"""
        client = next(self.turns)
        endpoint = client.chat.completions if "messages" in request else client.completions
        try:
            response = endpoint.with_raw_response.create(
                model=self.args.model, max_tokens=self.args.max_new_tokens, **request)
        except openai.APIStatusError as e:
            told = f"{e.status_code} {' '.join(e.response.text.split())[:300]}"
            if e.status_code in (400, 413, 422):
                return None, f"{REFUSED}: {told}"
            raise ValueError(told)
        data = json.loads(response.http_response.text)
        if not isinstance(data, dict) or not data.get("choices"):
            raise ValueError(f"no choices: {json.dumps(data)[:300]}")
        choice = data["choices"][0]
        if choice.get("finish_reason") == "content_filter":
            return None, f"{REFUSED}: content filter"
        text = choice["message"].get("content") if "message" in choice else choice.get("text")
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        return text or "", CUT if choice.get("finish_reason") == "length" else None


def plain(text):
    """The text without what looks like a special token"""
    return SPECIAL.sub(" ", text)


def is_local(url):
    """Whether a server runs on this machine. Then it is asked directly, whatever proxy is set."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified  # 0.0.0.0, as servers print it
    except ValueError:  # a name
        return host in ("localhost", socket.gethostname())
