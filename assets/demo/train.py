"""Train the demo model: a small Llama that writes children's stories, from one text file, on a CPU.

    python assets/demo/train.py --train tinystories-train.txt --evaluate tinystories-eval.txt

The defaults are the shipped recipe and seed. Two CPU cores with bfloat16 matrix instructions need
about half an hour: where the epochs take longer than `--minutes`, the schedule follows the clock.

    python assets/demo/train.py --evaluate-only --evaluate FILE [FILE ...]

prints the loss of the model in `--out` (this folder) on texts, and three greedy samples.
"""

import argparse
import copy
import itertools
import json
import math
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS = "<s>"  # begins every story, and so ends the one before it
SEPARATOR = "<|endoftext|>"
OPENING = re.compile(
    r"Once[ ,]|One (\w+ )?(day|morning|night),? (a|an|two|three|there)\b"
    r"|There (was|were|once|lived)\b"
)
INSIDE = re.compile(  # how a paragraph begins that goes on with a story
    r"[\"']|(The|His|Her|He|She|It|They|But|So|Then|When|After)\b"
    r"|[^.\n]{,60}\b(said|asked|replied|smiled)\b"
)
PROMPTS = ("Once upon a time", "One day, a little bird", "Tom and his sister")


@dataclass
class Config:
    vocab_size: int = 2048  # tokens, byte-level BPE
    context: int = 512  # tokens
    d_model: int = 256
    d_ff: int = 768  # neurons per MLP; divides into 2, 3, 4, ... 64 branches
    layers: int = 6
    heads: int = 8
    dropout: float = 0.1  # on the embedding, 0..1
    batch_tokens: int = 4096  # tokens per step, padding included
    epochs: float = 8.0  # passes over the training text, or
    minutes: float = 27.0  # wall time of training, if that is over before
    lr: float = 3e-3  # peak learning rate
    warmup: float = 0.03  # share of the training
    decay: float = 0.6  # share of the training, at its end, in which the rate falls to zero
    weight_decay: float = 0.1  # of matrices
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.99  # how much the averaged weights keep at each step
    join: float = 0.3  # chance that a story is put behind the one before it in the same row
    held_out: float = 0.03  # share of the training stories that choose the checkpoint
    seed: int = 1


def read_stories(path: str) -> list[str]:
    """The stories of a text, one line per paragraph; what follows the last separator has none."""
    *pieces, last = Path(path).read_text(encoding="utf-8").split(SEPARATOR)
    pieces += split_unmarked(last)
    stories = [re.sub(r"\s*\n\s*", "\n", piece.strip()) for piece in pieces]
    return [story for story in stories if story]


def split_unmarked(text: str) -> list[str]:
    """Stories that only a newline separates. Most have blank lines between their paragraphs, so a
    single newline between two such pieces is a border, unless the second goes on like the inside of
    a story; otherwise only a usual opening is."""
    pieces = re.split(r"(?<!\n)\n(?!\n)", re.sub(r"[ \t]+\n", "\n", text.strip()))
    stories = pieces[:1]
    for before, piece in itertools.pairwise(pieces):
        spaced = "\n\n" in before and "\n\n" in piece
        if OPENING.match(piece) or (spaced and not INSIDE.match(piece)):
            stories.append(piece)
        else:
            stories[-1] += "\n" + piece
    return stories


def train_tokenizer(stories: list[str], config: Config) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text comes back exactly, and every encoded text begins with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        model_max_length=config.context,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: Config) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what adds up over the layers
            weight.data /= math.sqrt(2 * config.layers)
    return model


def windows(tokens: list[int], context: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) that predict each of tokens[1:] once. Windows overlap by half; what an
    earlier one predicted has the target -100."""
    rows, done, start = [], 1, 0  # done: how many tokens need no further prediction
    while done < len(tokens):
        end = min(start + context, len(tokens) - 1)
        targets = [tokens[i] if i >= done else -100 for i in range(start + 1, end + 1)]
        rows.append((tokens[start:end], targets))
        done, start = end + 1, max(end + 1 - context // 2, 0)
    return rows


def batches(rows: list, batch_tokens: int):
    """Rows of similar length together, padded at the right: there, causality needs no mask."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    while rows:
        width = len(rows[-1][0])
        taken = rows[-max(1, batch_tokens // width) :]
        del rows[-len(taken) :]
        inputs = torch.tensor([x + [0] * (width - len(x)) for x, _ in taken])  # (rows, width)
        targets = torch.tensor([y + [-100] * (width - len(y)) for _, y in taken])  # (rows, width)
        yield inputs, targets


def epoch(stories: list[list[int]], config: Config, rng: random.Random) -> list:
    """The batches of one pass, shuffled. Some rows hold several stories: late positions, too."""
    stories = sorted(stories, key=lambda _: rng.random())
    rows = [list(stories[0])]
    for story in stories[1:]:
        if rng.random() < config.join and len(rows[-1]) + len(story) <= config.context + 1:
            rows[-1] += story[1:]  # the row already ends with this story's BOS
        else:
            rows.append(list(story))
    cut = [window for row in rows for window in windows(row, config.context)]
    shuffled = list(batches(cut, config.batch_tokens))
    rng.shuffle(shuffled)
    return shuffled


def loss_of(model, inputs, targets, reduction="mean"):
    """Next-token loss in nats, of (rows, width) inputs and targets."""
    logits = model(input_ids=inputs, use_cache=False).logits  # (rows, width, vocab_size)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model, tokenizer, stories: list[str]) -> dict:
    """Loss per token and bits per byte; each story is a document, and its end is not scored."""
    model.eval()
    context = model.config.max_position_embeddings
    encoded = [tokenizer(story, verbose=False).input_ids for story in stories]
    rows = [window for tokens in encoded for window in windows(tokens, context)]
    nats = sum(loss_of(model, x, y, "sum").item() for x, y in batches(rows, 8192))
    tokens = sum(t >= 0 for _, targets in rows for t in targets)
    size = sum(len(story.encode()) for story in stories)
    return {
        "stories": len(stories),
        "bytes": size,
        "tokens": tokens,
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def optimizers(model, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for the embedding, and, undecayed, the norms."""
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = {"params": [model.model.embed_tokens.weight], "weight_decay": config.weight_decay}
    rest = [embedding, {"params": norms, "weight_decay": 0.0}]
    muon = {"weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [
        torch.optim.Muon(blocks, lr=config.lr, **muon),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), fused=True),
    ]


def train(model, tokenizer, stories: list[str], held_out: list[str], config: Config):
    """Returns the averaged weights that were best on the held-out stories."""
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, output: F.dropout(output, config.dropout, module.training)
    )
    rng = random.Random(config.seed)
    encoded = [[*tokenizer(s, verbose=False).input_ids, tokenizer.eos_token_id] for s in stories]
    average = build_model(config)
    average.load_state_dict(model.state_dict())
    best, best_bits, queue, step, seen = None, math.inf, [], 0, 0
    steppers = optimizers(model, config)
    start, done, checked = time.time(), 0.0, 0.0
    total = config.epochs * sum(len(story) - 1 for story in encoded)  # tokens to predict
    while done < 1:
        if not queue:
            queue = epoch(encoded, config, rng)
        inputs, targets = queue.pop()
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        step, seen = step + 1, seen + (targets >= 0).sum().item()
        done = min(1.0, max(seen / total, (time.time() - start) / 60 / config.minutes))
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = config.lr * min(1.0, done / config.warmup, (1 - done) / config.decay)
            stepper.step()
            stepper.zero_grad()
        with torch.no_grad():
            keep = min(config.ema, step / (step + 10))
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
        if done >= 1 or done - checked >= (0.05 if done < 0.7 else 0.025):
            checked = done
            with torch.autocast("cpu", torch.bfloat16):
                bits = evaluate(average, tokenizer, held_out)["bits_per_byte"]
            line = f"{(time.time() - start) / 60:5.1f} min {done:4.0%} step {step} tokens {seen:,}"
            print(f"{line} loss {loss.item():.3f} held-out bits per byte {bits}", flush=True)
            if bits < best_bits:
                best, best_bits = copy.deepcopy(average.state_dict()), bits
    average.load_state_dict(best)
    return average


def save(model, tokenizer, folder: Path) -> None:
    """Weights in bfloat16; the tokenizer under the class name that older transformers know too."""
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(named, indent=2) + "\n")


def main() -> None:
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=verbatim)
    parser.add_argument("--train", help="training text")
    parser.add_argument("--evaluate", nargs="*", default=[], help="texts to report the loss on")
    parser.add_argument("--evaluate-only", action="store_true", help="train nothing, load --out")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="the model's folder")
    for name, value in asdict(Config()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    args = parser.parse_args()
    config = Config(**{name: getattr(args, name) for name in asdict(Config())})

    if not args.evaluate_only:
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        stories = read_stories(args.train)
        random.shuffle(stories)
        held_out = stories[: int(config.held_out * len(stories))]
        stories = stories[len(held_out) :]
        tokenizer = train_tokenizer(stories, config)
        model = train(build_model(config), tokenizer, stories, held_out, config)
        save(model, tokenizer, Path(args.out))

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    print("parameters", sum(p.numel() for p in model.parameters()))
    for path in args.evaluate:
        measured = evaluate(model, tokenizer, read_stories(path))
        print(Path(path).name, json.dumps(measured), flush=True)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        written = model.generate(inputs.input_ids, do_sample=False, max_new_tokens=200)[0]
        print("\n" + tokenizer.decode(written, skip_special_tokens=True))


if __name__ == "__main__":
    main()
