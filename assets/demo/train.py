"""Train the demo model: a small Llama that writes children's stories, from text files, on a CPU.

    python assets/demo/train.py assets/demo/stories.txt tinystories-train.txt

The defaults are the shipped recipe and seed; `assets/demo/README.md` tells how long it takes, what
each part of the recipe brings, and how the result is measured (`measure.py`).
"""

import argparse
import copy
import itertools
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from stories import Renaming, read_stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<s>"  # begins every story, and so ends the one before it


@dataclass
class Config:
    vocab_size: int = 2048  # tokens, byte-level BPE
    context: int = 512  # tokens
    d_model: int = 256
    d_ff: int = 768  # neurons per MLP; divides into 2, 3, 4, ... 64 branches
    layers: int = 8
    heads: int = 8
    dropout: float = 0.1  # 0..1, on the embedding
    block_dropout: float = 0.1  # 0..1, on what each attention and each MLP adds
    rename: float = 0.5  # chance that a story's characters get other names in a pass
    rows: int = 12  # per step, each filled with whole stories up to the context
    epochs: float = 8.0  # passes over the training stories
    lr: float = 3e-3  # peak learning rate
    warmup: float = 0.03  # share of the training
    decay: float = 0.6  # share of the training, at its end, in which the rate falls to zero
    weight_decay: float = 0.5  # of matrices
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.99  # how much the averaged weights keep at each step
    held_out: float = 0.03  # share of the training stories that choose the checkpoint
    share: float = 1.0  # share of the other stories that is used; less for experiments
    compile: int = 1  # 0: without torch.compile, slower but with no compiler
    seed: int = 1


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


def add_dropout(model, config: Config) -> None:
    """Stock Llama has none but on attention weights: hooks, which no checkpoint keeps."""

    def dropping(chance):
        return lambda module, _, output: F.dropout(output, chance, module.training)

    model.model.embed_tokens.register_forward_hook(dropping(config.dropout))
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(dropping(config.block_dropout))
        layer.mlp.register_forward_hook(dropping(config.block_dropout))


def pack(stories: list[list[int]], width: int) -> list[list[list[int]]]:
    """Rows of whole stories, at most `width` tokens in each; a longer story is cut into pieces that
    share one token, so that each is predicted once. A piece goes where it first fits."""
    rows, room = [], []
    for story in stories:
        for start in range(0, max(1, len(story) - 1), width - 1):
            piece = story[start : start + width]
            fits = (i for i in range(max(0, len(rows) - 64), len(rows)) if room[i] >= len(piece))
            i = next(fits, None)
            if i is None:
                rows.append([])
                room.append(width)
                i = len(rows) - 1
            rows[i].append(piece)
            room[i] -= len(piece)
    return rows


def batch(rows: list[list[list[int]]], width: int):
    """inputs, targets (rows, width); positions (rows, width), from 0 in each piece; and which
    token sees which (rows, 1, width, width): those before it in its piece. Targets are -100 at the
    last token of a piece and in the padding."""
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(inputs, -100)
    positions = torch.zeros_like(inputs)
    piece_of = torch.full_like(inputs, -1)
    for r, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row):
            end = at + len(piece)
            inputs[r, at:end] = torch.tensor(piece)
            targets[r, at : end - 1] = torch.tensor(piece[1:])
            positions[r, at:end] = torch.arange(len(piece))
            piece_of[r, at:end] = number
            at = end
    together = piece_of[:, None, :, None] == piece_of[:, None, None, :]
    return inputs, targets, positions, together & torch.ones(width, width, dtype=torch.bool).tril()


def logits_of(model, inputs, positions, seen):
    """(rows, width, vocab_size)"""
    return model(
        input_ids=inputs, position_ids=positions, attention_mask=seen, use_cache=False
    ).logits


def loss_of(model, inputs, targets, positions, seen):
    """Mean next-token loss in nats."""
    logits = logits_of(model, inputs, positions, seen)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_byte(model, tokenizer, stories: list[str], config: Config) -> float:
    """Each story is a document of its own, whose end is not scored."""
    model.eval()
    encoded = [tokenizer(story, verbose=False).input_ids for story in stories]
    rows, nats = pack(encoded, config.context), 0.0
    for i in range(0, len(rows), config.rows):
        inputs, targets, positions, seen = batch(rows[i : i + config.rows], config.context)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, inputs, positions, seen)
        flat = logits.float().flatten(0, 1)
        nats += F.cross_entropy(flat, targets.flatten(), reduction="sum").item()
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)


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


def passes(stories: list[str], tokenizer, config: Config, rng: random.Random):
    """The batches of one pass after the other, for ever: (passes done, batch)."""
    rename = Renaming(stories)
    for number in itertools.count():
        order = rng.sample(stories, len(stories))
        told = [rename(s, rng) if rng.random() < config.rename else s for s in order]
        encoded = tokenizer(told, verbose=False).input_ids
        rows = pack([[*ids, tokenizer.eos_token_id] for ids in encoded], config.context)
        if len(rows) < config.rows:
            raise SystemExit(
                f"the training texts fill {len(rows)} rows; a step takes {config.rows}"
            )
        rng.shuffle(rows)
        # only whole batches, so that one compiled graph serves them all
        for i in range(0, len(rows) - config.rows + 1, config.rows):
            passed = number + (i + config.rows) / len(rows)
            yield passed, batch(rows[i : i + config.rows], config.context)


def train(model, tokenizer, stories, held_out, config: Config):
    """Returns the averaged weights that were best on the held-out stories."""
    add_dropout(model, config)
    average = build_model(config)
    average.load_state_dict(model.state_dict())
    best, best_bits, step, checked = None, math.inf, 0, 0.0
    steppers = optimizers(model, config)
    start = time.time()
    objective = torch.compile(loss_of, dynamic=False) if config.compile else loss_of
    rng = random.Random(config.seed)
    for passed, (inputs, targets, positions, seen) in passes(stories, tokenizer, config, rng):
        done = min(1.0, passed / config.epochs)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(model, inputs, targets, positions, seen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        step += 1
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = config.lr * min(1.0, done / config.warmup, (1 - done) / config.decay)
            stepper.step()
            stepper.zero_grad()
        with torch.no_grad():
            keep = min(config.ema, step / (step + 10))
            torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - keep)
        if done >= 1 or done - checked >= 0.05:
            checked = done
            bits = bits_per_byte(average, tokenizer, held_out, config)
            line = f"{(time.time() - start) / 60:5.1f} min {done:4.0%} step {step}"
            print(f"{line} loss {loss.item():.3f} held-out bits per byte {bits:.4f}", flush=True)
            if bits < best_bits:
                best, best_bits = copy.deepcopy(average.state_dict()), bits
        if done >= 1:
            break
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
    parser.add_argument("texts", nargs="+", help="training texts")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="the model's folder")
    for name, value in asdict(Config()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    args = parser.parse_args()
    config = Config(**{name: getattr(args, name) for name in asdict(Config())})

    random.seed(config.seed)
    torch.manual_seed(config.seed)
    stories = [story for path in args.texts for story in read_stories(path)]
    random.Random(1).shuffle(stories)
    held_out = stories[: int(config.held_out * len(stories))]
    stories = stories[len(held_out) :]
    stories = stories[: int(config.share * len(stories))]
    tokenizer = train_tokenizer(stories, config)
    model = train(build_model(config), tokenizer, stories, held_out, config)
    save(model, tokenizer, Path(args.out))


if __name__ == "__main__":
    main()
