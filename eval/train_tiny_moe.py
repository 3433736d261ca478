"""Train a small mixture of experts on text that lies on any Python machine, until experts differ.

    python eval/train_tiny_moe.py -o tiny                          # 55 minutes, as the one bundled
    python eval/train_tiny_moe.py -o tiny --minutes 3              # a quick look
    python eval/train_tiny_moe.py -o tiny --text notes=~/notes --text code=~/src
    python eval/train_tiny_moe.py -o second --family mixtral       # the lab's second model
    python eval/train_tiny_moe.py -o third --family deepseek_v3    # its third
    python eval/train_tiny_moe.py -o fourth --family qwen3_moe     # and its fourth

`qwen2_moe`: 60 routed experts of 48 hidden units, top-4 without renormalisation, one shared expert,
6 layers: the shape of Qwen1.5-MoE in miniature. `mixtral`: 16 larger experts of 160, the best two
renormalised, balanced by the auxiliary loss. `deepseek_v3`: 32 experts of 64 in four groups of
which two are open to a token, top-4 of sigmoid scores with a correction bias that a step moves
against the load (auxiliary-loss-free balancing, arXiv 2408.15664), a shared expert, the first layer
dense. `qwen3_moe`: 32 experts of 64, top-4 renormalised, balanced by the auxiliary loss, nothing
shared. Text is found by itself (Python sources, documentation and
other text of the installed packages, C headers, manual pages), or given as `--text
domain=directory`. A tenth of each domain's documents is held out. Writes the model, its tokenizer,
`training.json` with the losses, and `text/{calibration,heldout}/<domain>.jsonl`. With `--steps` the
same seed gives the same weights. A run that is killed goes on from its last checkpoint in
OUT.partial.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moe_fair.moe.blocks import find_blocks

SITE, LIBRARY = (Path(sysconfig.get_paths()[k]) for k in ("purelib", "stdlib"))
FOUND = {  # domain -> (directory, suffixes)
    "python": [(LIBRARY, (".py",)), (SITE, (".py",))],
    "documents": [(SITE, (".md", ".rst", ".txt")), (LIBRARY, (".txt", ".rst"))],
    "headers": [(Path("/usr/include"), (".h",)), (SITE, (".h", ".hpp", ".pyi"))],
    "manuals": [(Path("/usr/share/man"), (".gz",)), (Path("/usr/share/doc"), (".gz", ".txt"))],
}
SPOKEN = (".py", ".js", ".rs", ".c", ".h", ".md", ".rst", ".txt", ".jsonl", ".json", ".html")
END = "<|endoftext|>"
CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALIBRATION_BYTES, HELDOUT_BYTES = 280_000, 140_000
SAVE_EVERY = 120  # seconds


def documents(places: list[tuple[Path, tuple[str, ...]]], most: int, seed: int) -> list[str]:
    """Texts under these directories, each once, in seeded order, up to so many bytes."""
    files = sorted(
        f for folder, suffixes in places if folder.is_dir() for f in walk(folder, suffixes)
    )
    random.Random(seed).shuffle(files)
    seen: set[bytes] = set()
    found: list[str] = []
    size = 0
    for file in files:
        text = read(file)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 500 or digest in seen or max(map(len, text.splitlines())) > 1000:
            continue  # too short, a copy, or not written by people
        seen.add(digest)
        found.append(text[:50_000])
        size += len(found[-1])
        if size > most:
            break
    return found


def walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files with one of the suffixes, links not followed."""
    for root, _, names in os.walk(folder):
        yield from (Path(root) / n for n in names if n.endswith(suffixes))


def read(file: Path) -> str:
    """A text file's content; empty where it is none."""
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, ValueError, EOFError):
        return ""


def gather(args: argparse.Namespace) -> dict[str, tuple[list[str], list[str]]]:
    """Domain -> (training documents, held-out documents)."""
    places: dict[str, Any] = FOUND
    if args.text:
        pairs = [t.partition("=") for t in args.text]
        places = {name: [(Path(where).expanduser(), SPOKEN)] for name, _, where in pairs}
    texts = {d: documents(p, args.max_bytes, args.seed) for d, p in places.items()}
    texts = {d: t for d, t in texts.items() if len(t) >= 10}
    if len(texts) < 2:
        sys.exit(
            f"train_tiny_moe: error: text of {len(texts)} domain(s) found, two are needed with ten "
            "documents each; give --text name=directory"
        )
    return {d: (t[len(t) // 10 :], t[: len(t) // 10]) for d, t in texts.items()}


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    made.chat_template = CHAT
    return made


FAMILIES: dict[str, dict[str, Any]] = {  # experts, top_k and expert_hidden may be given instead
    "qwen2_moe": {"experts": 60, "top_k": 4, "expert_hidden": 48},
    "mixtral": {"experts": 16, "top_k": 2, "expert_hidden": 160},
    "deepseek_v3": {"experts": 32, "top_k": 4, "expert_hidden": 64},
    "qwen3_moe": {"experts": 32, "top_k": 4, "expert_hidden": 64},
}


def particular(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration keys in which the families differ."""
    wide = 4 * args.expert_hidden
    if args.family == "mixtral":
        return {"num_local_experts": args.experts, "intermediate_size": args.expert_hidden}
    if args.family == "qwen2_moe":
        return {
            "num_experts": args.experts,
            "moe_intermediate_size": args.expert_hidden,
            "shared_expert_intermediate_size": wide,
            "intermediate_size": wide,
            "norm_topk_prob": False,
        }
    if args.family == "qwen3_moe":
        return {
            "num_experts": args.experts,
            "moe_intermediate_size": args.expert_hidden,
            "intermediate_size": wide,
            "head_dim": args.hidden // 4,
            "norm_topk_prob": True,
        }
    return {
        "n_routed_experts": args.experts,
        "moe_intermediate_size": args.expert_hidden,
        "intermediate_size": wide,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 32,
        "rope_interleave": True,
    }


def make_model(args: argparse.Namespace, vocabulary: int) -> Any:
    """The model with random weights."""
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(
        args.family,
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=4 * args.length,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.005,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **particular(args),
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Loads:
    """Counts the tokens that each expert of each layer gets, and balances where a bias is there."""

    def __init__(self, model: Any, experts: int) -> None:
        self.blocks = list(find_blocks(model))
        self.counts = torch.zeros(len(self.blocks), experts, dtype=torch.int64)
        for i, block in enumerate(self.blocks):
            block.experts.register_forward_pre_hook(self.counter(i))

    def counter(self, i: int) -> Any:
        """A hook that adds one layer's choices to the counts."""

        def count(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            chosen = given[1].flatten()
            self.counts[i] += torch.bincount(chosen, minlength=self.counts.shape[1])

        return count

    def take(self) -> torch.Tensor:
        """The counts since the last call, [layers, experts]."""
        counts, self.counts = self.counts, torch.zeros_like(self.counts)
        return counts

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Move each correction bias a step against the load; nothing without such biases."""
        for block, counts in zip(self.blocks, self.take().double(), strict=True):
            bias = dict(block.block.named_buffers()) | dict(block.block.named_parameters())
            for name, tensor in bias.items():
                if name.endswith("e_score_correction_bias"):
                    tensor += speed * torch.sign(counts.mean() - counts).to(tensor.dtype)


def tokens_of(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """All documents as one stream with an end mark after each."""
    ids = tokenizer([t + END for t in texts], verbose=False)["input_ids"]
    return torch.tensor([i for doc in ids for i in doc])


def draw(streams: list[torch.Tensor], args: argparse.Namespace, step: int) -> torch.Tensor:
    """The batch of one step, [batch, length]: windows of the domains in turn."""
    rng = random.Random(f"{args.seed} {step}")
    rows = []
    for i in range(args.batch_size):
        stream = streams[(step * args.batch_size + i) % len(streams)]
        start = rng.randrange(max(1, len(stream) - args.length))
        rows.append(stream[start : start + args.length])
    return torch.stack(rows)


def rate(args: argparse.Namespace, done: float) -> float:
    """Learning rate after this share of the training: a short rise, then a cosine."""
    if done < 0.02:
        return args.lr * done / 0.02
    return args.lr * (0.05 + 0.95 * 0.5 * (1 + float(torch.cos(torch.tensor(done * 3.14159)))))


def train(model: Any, streams: list[torch.Tensor], args: argparse.Namespace, work: Path) -> list:
    """Train until the steps or the minutes are used up; returns [step, loss] pairs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    step, spent, losses = resume(work, model, optimizer)
    loads = Loads(model, args.experts)
    model.train()
    started = saved = time.perf_counter()
    while True:
        elapsed = spent + time.perf_counter() - started
        done = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if done >= 1:
            return losses
        for group in optimizer.param_groups:
            group["lr"] = rate(args, done)
        batch = draw(streams, args, step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loads.balance(0.002 if done < 0.9 else 0.0)
        step += 1
        if step % 10 == 0 or step == 1:
            losses.append([step, round(loss.item(), 4)])
            print(f"step {step} ({done:.0%}): loss {loss.item():.3f}, {elapsed:.0f} s", flush=True)
        if time.perf_counter() - saved > SAVE_EVERY:
            save_state(work, model, optimizer, step, elapsed, losses)
            saved = time.perf_counter()


def save_state(
    work: Path, model: Any, optimizer: Any, step: int, spent: float, losses: list
) -> None:
    """A checkpoint, whole or not at all."""
    state = {"optimizer": optimizer.state_dict(), "step": step, "spent": spent, "losses": losses}
    torch.save({"model": model.state_dict(), **state}, work / "state.writing")
    (work / "state.writing").replace(work / "state.pt")


def resume(work: Path, model: Any, optimizer: Any) -> tuple[int, float, list]:
    """Step, seconds and losses of an interrupted run, whose state is put back."""
    if not (work / "state.pt").is_file():
        return 0, 0.0, []
    state = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"going on from step {state['step']}", flush=True)
    return state["step"], state["spent"], state["losses"]


@torch.no_grad()
def examine(model: Any, heldout: dict[str, torch.Tensor], args: argparse.Namespace) -> dict:
    """Held-out loss per domain, and how far apart the domains' routing lies in every layer."""
    model.eval()
    loads = Loads(model, args.experts)
    losses, shares = {}, []
    for domain, stream in heldout.items():
        rows = stream[: len(stream) // args.length * args.length].view(-1, args.length)[:32]
        logits = model(input_ids=rows, output_router_logits=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        losses[domain] = round(float(loss), 4)
        counts = loads.take().double()
        shares.append(counts / counts.sum(1, keepdim=True))
    pairs = [(a - b).abs().sum(1) / 2 for i, a in enumerate(shares) for b in shares[:i]]
    apart = torch.stack(pairs).mean(0)
    return {"heldout": losses, "routing_distance": [round(float(x), 3) for x in apart]}


def write_texts(texts: dict[str, tuple[list[str], list[str]]], folder: Path) -> None:
    """Calibration text from the training documents, held-out text from the others."""
    for part, index, most in (("calibration", 0, CALIBRATION_BYTES), ("heldout", 1, HELDOUT_BYTES)):
        (folder / "text" / part).mkdir(parents=True, exist_ok=True)
        for domain, split in texts.items():
            size = 0
            with (folder / "text" / part / f"{domain}.jsonl").open("w") as f:
                for text in split[index]:
                    line = json.dumps({"text": text, "domain": domain}) + "\n"
                    if size + len(line) > most and size:
                        break
                    size += f.write(line)


def main() -> None:
    """Gather, train, examine, write."""
    args = arguments()
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"train_tiny_moe: error: {args.output} is not empty")
    texts = gather(args)
    for domain, (train_texts, held) in texts.items():
        print(f"{domain}: {len(train_texts)} documents to train on, {len(held)} held out")
    work = args.output.with_name(args.output.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer([t for split, _ in texts.values() for t in split], args.vocab)
    model = make_model(args, len(tokenizer))
    streams = [tokens_of(tokenizer, split) for split, _ in texts.values()]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)
    losses = train(model, streams, args, work)
    heldout = {d: tokens_of(tokenizer, held) for d, (_, held) in texts.items()}
    report = {"losses": losses, **examine(model, heldout, args)}
    print(f"held-out loss: {report['heldout']}")
    print(f"distance between the domains' routing, per layer: {report['routing_distance']}")
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / "training.json").write_text(json.dumps(report, indent=1))
    write_texts(texts, work)
    (work / "state.pt").unlink(missing_ok=True)
    if args.output.exists():
        args.output.rmdir()
    work.rename(args.output)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--text", action="append", help="domain=directory; repeat")
    parser.add_argument("--max-bytes", type=int, default=6_000_000, help="per domain")
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--steps", type=int, help="instead of --minutes; reproducible")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2_moe")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, help="routed experts of a layer")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--expert-hidden", type=int, help="hidden units of one expert")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for key, usual in FAMILIES[args.family].items():
        if getattr(args, key) is None:
            setattr(args, key, usual)
    return args


if __name__ == "__main__":
    main()
