"""Vision-language models of other papers, with random weights, run by transformers with a static cache.

Only the sizes are theirs: an image encoder, a projector, and a transformer language model in transformers' own code.
Without the graph, `generate(cache_implementation="static")` runs the model. With the graph, one decoding step on the
same kind of cache is captured as a CUDA graph by hand and replayed. transformers itself makes graphs with
`torch.compile`, which would have to compile the model for each batch size. As in transformers, the prompt runs without
a graph.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.config import TowerConfig, VisionConfig
from model.presets import SIGLIP
from model.vision import Towers
from pipeline.latency.contender import IMAGE, PROMPT, TEXT_TOKENS, TOKEN, Mark, random_images

WARM_UPS = 3
CLIP = TowerConfig(
    name="clip",
    timm_name="vit_large_patch14_clip_336.openai",
    width=1024,
    depth=24,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Size of a vision-language model.

    architecture    language model of transformers: "Phi" or "Llama"
    settings        values of its configuration class
    pool            patches along one side that the projector averages to one image token
    like            published model of this size
    """

    vision: VisionConfig
    architecture: str
    settings: dict[str, Any] = field(hash=False)
    pool: int = 1
    like: str

    @property
    def image_tokens(self) -> int:
        return (self.vision.grid // self.pool) ** 2


_SHARED = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 16384}
PHI2_SIGLIP = Peer(
    vision=VisionConfig(towers=(SIGLIP,)),
    architecture="Phi",
    settings=_SHARED | {"vocab_size": 51200, "intermediate_size": 10240, "partial_rotary_factor": 0.4},
    like="TinyLLaVA",
)
LLAMA_CLIP = Peer(
    vision=VisionConfig(towers=(CLIP,), image_px=336),
    architecture="Llama",
    settings=_SHARED | {"vocab_size": 32000, "intermediate_size": 6912},
    pool=2,
    like="MobileVLM V2",
)


def tiny(peer: Peer) -> Peer:
    """Shrink a peer so that it runs on a CPU: 8×8 patches, two layers."""
    [tower] = peer.vision.towers
    overrides = {"img_size": 112, "embed_dim": 32, "depth": 2, "num_heads": 2}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    return replace(
        peer,
        vision=VisionConfig(towers=(replace(tower, width=32, depth=2, overrides=overrides),), image_px=112),
        settings=peer.settings | small | {"intermediate_size": 64},
    )


PEERS = {"phi2_siglip": PHI2_SIGLIP, "llama_clip": LLAMA_CLIP}
PEERS |= {f"tiny_{name}": tiny(peer) for name, peer in PEERS.items()}


class PeerModel(nn.Module):
    """Image encoder, projector and language model of a peer."""

    def __init__(self, peer: Peer, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        import transformers

        self.peer = peer
        width = peer.settings["hidden_size"]
        config = getattr(transformers, f"{peer.architecture}Config")(**peer.settings)
        with torch.device(device):
            self.towers = Towers(peer.vision).to(dtype)
            self.projector = nn.Sequential(nn.Linear(peer.vision.width, width), nn.GELU(), nn.Linear(width, width)).to(
                dtype
            )
            self.llm = getattr(transformers, f"{peer.architecture}ForCausalLM")._from_config(config, dtype=dtype)
        self.requires_grad_(False).eval()

    def embed_image(self, pixels: Tensor) -> Tensor:  # uint8 [b, 3, height, width] -> [b, n, d]
        x = self.projector(self.towers(pixels))
        grid = x.mT.unflatten(2, (self.peer.vision.grid, -1))  # [b, d, rows, columns]
        return nn.functional.avg_pool2d(grid, self.peer.pool).flatten(2).mT


class TransformersPeer:
    """A peer's model with a static cache for the prompt and `tokens` generated tokens."""

    def __init__(self, model: PeerModel, *, batch: int, tokens: int, graph: bool) -> None:
        import transformers

        self.model, self.device = model, next(model.parameters()).device
        llm = model.llm
        self.prompt_tokens = model.peer.image_tokens + TEXT_TOKENS
        self.pixels = random_images(model.peer.vision, batch, self.device)
        self.text = torch.randint(llm.config.vocab_size, (batch, TEXT_TOKENS), device=self.device)
        self.cache_name = "cache" if "cache" in inspect.signature(llm.forward).parameters else "past_key_values"
        self.tokens = tokens
        embedding = llm.get_input_embeddings().weight
        keys_and_values = 2 * llm.config.num_hidden_layers * llm.config.hidden_size * embedding.element_size()
        weights = sum(parameter.nbytes for parameter in llm.parameters()) - embedding.nbytes  # a few of its rows
        self.bytes_per_step = weights + batch * keys_and_values * (self.prompt_tokens + tokens // 2)
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self.cache = transformers.StaticCache(config=llm.config, max_cache_len=self.prompt_tokens + tokens)
            self.token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
            self._capture()

    def answer(self, tokens: int, mark: Mark) -> None:
        with torch.no_grad():
            image = self.model.embed_image(self.pixels)
            mark(IMAGE)
            prompt = torch.cat([image, self.model.llm.get_input_embeddings()(self.text)], 1)
            if self.graph is None:
                self.generate(prompt, tokens, mark)
                return
            self.cache.reset()
            self._step(inputs_embeds=prompt)
            mark(PROMPT)
            for _ in range(tokens - 1):
                self.graph.replay()
                mark(TOKEN)

    def generate(self, prompt: Tensor, tokens: int, mark: Mark) -> Tensor:  # [b, tokens]
        """Run `generate` of transformers, which stops after `tokens` tokens and has room for all."""

        def enough(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.full(ids.shape[:1], ids.shape[1] >= tokens, device=ids.device)

        return self.model.llm.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.int64, device=self.device),
            cache_implementation="static",
            disable_compile=True,
            max_new_tokens=self.tokens,  # size of the cache
            stopping_criteria=[enough],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=_marking_streamer(mark),
        )

    def _step(self, **inputs: Any) -> None:
        """Run the language model on its inputs, and choose the next token."""
        caching = {self.cache_name: self.cache, "use_cache": True}
        logits = self.model.llm(**inputs, **caching, logits_to_keep=1).logits
        torch.argmax(logits[:, -1:], -1, out=self.token)

    @torch.no_grad()
    def _capture(self) -> None:
        self._step(inputs_embeds=self.model.llm.get_input_embeddings()(self.text))  # allocates the cache
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step(input_ids=self.token)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(input_ids=self.token)


def _marking_streamer(mark: Mark) -> Any:
    """Return a streamer that calls `mark` for each generated token. transformers first passes the prompt to it."""
    from transformers.generation.streamers import BaseStreamer

    class Marker(BaseStreamer):
        calls = 0

        def put(self, value: Any) -> None:
            if self.calls:
                mark(PROMPT if self.calls == 1 else TOKEN)
            self.calls += 1

        def end(self) -> None:
            pass

    return Marker()
