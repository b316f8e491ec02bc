"""Run stage 1: encode the prompt with the model's T5 encoder, and the image if there is one, on the CPU.

A video to change is encoded on all chips. Writes stage1_embeddings.safetensors and generation_config.json (entries of
text, image and video only) to --output_dir. With --prompt_file each prompt has a folder of its own there; see
cogvideox/files/videos.py.
"""

import argparse
import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.cli import next_command
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.report import Report
from cogvideox.cli.stages import STAGES, add_stage1_options
from cogvideox.errors import UserError, shortened
from cogvideox.files import checkpoint, numbers, provenance, stage_files, videos, writing
from cogvideox.files.names import INDEX, VIDEO
from cogvideox.files.prompts import Prompt, read_prompts
from cogvideox.files.schemas import EMBEDDING_ENTRIES
from cogvideox.files.tensors import check_pointer, compute_dtype, open_tensors, read_tensors, values_by_dtype
from cogvideox.run import image_encoding, page_cache, video_encoding, warm
from cogvideox.run.accelerator import prepare_libraries
from utils import CONFIG, EMBEDDINGS

if TYPE_CHECKING:
    import torch
    from transformers import T5EncoderModel, T5Tokenizer

PROGRAM = "stage1_text_encoder.py"
EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")  # of one tensor
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # the token of a space
ROWS = 128  # T5's embedding has a row for each token, and may have more up to a multiple of this


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        "Stage 1 of CogVideoX on TPUs: encode the prompt, and the image of models that take one.",
        others=STAGES,
        prog=PROGRAM,
        usage="%(prog)s --prompt TEXT [options]",
    )
    add_stage1_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run stage 1 with these options, by default those of the command line."""
    arguments = parse_arguments(argv)
    output_dir = arguments.output_dir
    with Report("stage1", PROGRAM, arguments) as report, contextlib.ExitStack() as until_end:
        prompts = prompts_of(arguments)
        chosen = chosen_of(prompts, arguments.only)
        videos.check_prompts(output_dir, [prompt.folder for prompt in prompts])
        folders = videos.kept_for(output_dir, [prompt.folder for prompt in chosen], arguments.only)
        for folder in folders:
            until_end.enter_context(writing.claimed(folder, "stage1", report.warn))
        prompts = chosen
        check_outputs(prompts, arguments)
        prepare_libraries()
        model_id = checkpoint.resolve_model_id(arguments.model_id)
        page_cache.warm(model_id, "text_encoder", arguments.variant)
        transformer = checkpoint.read_config(model_id, "transformer")
        video_encoding.check_model(model_id, transformer, arguments)
        images, taken = image_encoding.images_of(prompts, model_id, transformer, arguments)
        frames = video_encoding.frames_of(model_id, arguments)

        report.title(f"Stage 1: text encoder of {model_id}")
        for line in taken:
            report.say(line)
        with report.phase("load"):
            width = transformer["text_embed_dim"]
            tokenizer, encoder = warm.kept(
                "text encoder",
                (provenance.state(model_id, "text_encoder", arguments.variant), width, arguments.dtype),
                lambda: load_text_encoder(model_id, width, report, arguments),
            )
            weights = provenance.weights(model_id, "text_encoder", arguments.variant)
            report.say(f"loaded tokenizer and text encoder: {encoder.num_parameters():,} parameters, {encoder.dtype}")
        length = transformer["max_text_seq_length"]
        negative = Prompt(arguments.negative_prompt, output_dir, "--negative_prompt")
        check_lengths(tokenizer, length, prompts, negative, report)
        warn_of_unknown(tokenizer, [*prompts, negative], report)
        if images or frames is not None:
            weights |= provenance.weights(model_id, "vae", arguments.variant)
        encoded, of_video = {}, {}
        if images:
            with report.phase("image"):
                encoded = image_encoding.encode_images(images, model_id, arguments, report)
        if frames is not None:
            weights |= {str(arguments.video.absolute()): provenance.file_digest(arguments.video)}
            with report.phase("video"):
                of_video = video_encoding.encode_video(frames, model_id, arguments, report)
        with report.phase("run"):
            negative_prompt_embeds = encode(tokenizer, encoder, negative.text, length)
            check_finite(negative_prompt_embeds, model_id)
            for prompt in prompts:
                prompt_embeds = encode(tokenizer, encoder, prompt.text, length)
                check_finite(prompt_embeds, model_id)
                texts = {"model_id": model_id, "prompt": prompt.text, "negative_prompt": negative.text}
                config = texts | prompt.entries(arguments.height, arguments.width) | entries_of_video(arguments)
                tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds} | of_video
                inputs = weights.copy()
                if prompt.image:
                    tensors |= encoded[prompt.image].tensors
                    inputs |= {str(prompt.image): encoded[prompt.image].digest}
                with report.aside("save"):
                    dtype = str(encoder.dtype).removeprefix("torch.")
                    made = provenance.as_metadata("stage1", inputs, arguments, {"dtype": dtype})
                    save(tensors, config, made, prompt.folder)
                report.say(f"wrote {prompt.folder / EMBEDDINGS} and {CONFIG}")

        if arguments.only is None:
            entries = [videos.Entry(prompt.folder, prompt.text) for prompt in prompts]
            videos.record(output_dir, entries, anew=prompts[0].is_line)
            if prompts[0].is_line:
                report.say(f"wrote {output_dir / INDEX}, which lists all videos")
        for name, tensor in tensors.items():
            report.add_array(name, tensor)
        before = next_command.options_of_run(output_dir, model_id)
        options = before | next_command.taken_over(vars(arguments))
        report.close(folders, next_command.stage2(output_dir, output_dir, model_id, options))


def prompts_of(arguments: argparse.Namespace) -> list[Prompt]:
    """Return the prompts of the options, at least one; raise UserError if --prompt_file is wrong."""
    image = arguments.image and arguments.image.absolute()
    if arguments.prompt_file:
        return read_prompts(arguments.prompt_file, arguments.output_dir, image)
    return [Prompt(arguments.prompt, arguments.output_dir, "--prompt", image=image)]


def chosen_of(prompts: list[Prompt], only: str | None) -> list[Prompt]:
    """Return those of the prompts that --only names; raise UserError if they are not there, or are no lines."""
    if only is not None and not prompts[0].is_line:
        raise UserError(f"--only {only} is for the prompts of a --prompt_file")
    return [prompts[number - 1] for number in numbers.named(only, len(prompts), "--only", first=1)]


def entries_of_video(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what generation_config.json has of a video to change."""
    if not arguments.video:
        return {}
    settings = {name: getattr(arguments, name) for name in ("strength", "height", "width", "frames")}
    return {"video": str(arguments.video.absolute()), **settings}


def check_outputs(prompts: Sequence[Prompt], arguments: argparse.Namespace) -> None:
    """Raise UserError if a file of the stage would replace an input or the log, or cannot be written."""
    outputs = [prompt.folder / name for prompt in prompts for name in (EMBEDDINGS, CONFIG)]
    outputs += [arguments.output_dir / INDEX] if arguments.prompt_file and arguments.only is None else []
    there = [("--output_dir", path) for path in outputs if path.parent.is_dir()]
    replaced = {prompt.folder / VIDEO for prompt in prompts}
    if arguments.video and arguments.video.resolve() in {path.resolve() for path in replaced}:
        raise UserError(
            f"--video {arguments.video} is where stage 3 will write the new one; choose another --output_dir"
        )
    inputs = [arguments.log_json, arguments.prompt_file, arguments.video, *{prompt.image for prompt in prompts}]
    writing.check_outputs(there, inputs, arguments.model_id)


def check_lengths(
    tokenizer: "T5Tokenizer", length: int, prompts: Sequence[Prompt], negative: Prompt, report: Report
) -> None:
    """Warn of a prompt that is longer than `length` tokens and will be cut off; raise UserError if it is one of many.

    Nobody reads the warnings of a hundred prompts.
    """
    for prompt in (*prompts, negative):
        if lost := text_beyond(tokenizer, prompt.text, length):
            fault = f"{prompt.source} is longer than {length} tokens; this is cut off: «{shortened(lost)}»"
            if prompt.is_line:
                raise UserError(f"{fault}; make it shorter")
            report.warn(fault)


def warn_of_unknown(tokenizer: "T5Tokenizer", prompts: Sequence[Prompt], report: Report) -> None:
    """Warn, once, if the tokenizer does not know half of a prompt, as of most scripts: others have its embeddings."""
    space, shares = tokenizer.convert_tokens_to_ids(SPACE), {}
    for prompt in prompts:
        tokens = [token for token in tokenizer(prompt.text, add_special_tokens=False).input_ids if token != space]
        share = tokens.count(tokenizer.unk_token_id) / max(len(tokens), 1)
        if share >= 0.5:
            shares[prompt.source.rstrip(",")] = share
    if shares:
        worst = max(shares, key=shares.__getitem__)
        of_all = f" (the worst of {len(shares)} such prompts)" if len(shares) > 1 else ""
        report.warn(
            f"{worst}: {shares[worst]:.0%} of the tokens are unknown to the tokenizer{of_all}; other texts of unknown "
            "tokens give the same video: write in a language that the model knows, such as English"
        )


def save(tensors: "Mapping[str, torch.Tensor]", config: Mapping, made: dict[str, str], folder: Path) -> None:
    """Write the tensors of a prompt, its embeddings each [1, T, width], and the config to its folder."""
    from safetensors.torch import save_file

    with writing.claimed(folder, "stage1"), writing.committing(folder, "stage1") as new:
        metadata = stage_files.made_from(config, EMBEDDING_ENTRIES) | made
        save_file(dict(tensors), new / EMBEDDINGS, metadata=metadata)
        stage_files.write_config(new, config)


def check_vocabulary(folder: Path) -> None:
    """Raise UserError if the tokenizer of a model's folder has no vocabulary."""
    vocabulary = [file for name in checkpoint.VOCABULARY if (file := folder / name).is_file() and file.stat().st_size]
    if not vocabulary:  # transformers would know no word, and not say so
        raise UserError(f"{folder} has neither {' nor '.join(checkpoint.VOCABULARY)}; {checkpoint.REMEDY}")
    for file in vocabulary:
        check_pointer(file)


def import_modules() -> None:
    """Import what loading and encoding need, so that no other part of the run waits for it."""
    import safetensors.torch  # noqa: F401
    from transformers import T5Config, T5EncoderModel, T5Tokenizer  # noqa: F401


def load_tokenizer(folder: Path) -> "T5Tokenizer":
    """Load the tokenizer of a model's folder; raise UserError if a file cannot be read."""
    from transformers import T5Tokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with checkpoint.load_errors(folder):
        return T5Tokenizer.from_pretrained(folder)


def load_text_encoder(
    model_id: str, width: int, report: Report, arguments: argparse.Namespace
) -> "tuple[T5Tokenizer, T5EncoderModel]":
    """Load the model's tokenizer and text encoder, with weights in the dtype of most of them or of --dtype.

    Args:
        model_id: a folder, or a model of the Hugging Face Hub.
        width: of the embeddings that the transformer takes.
        report: is told of a variant that nobody asked for, of what is converted, of a tokenizer that knows fewer
            tokens than expected, and of the seconds of its parts.
        arguments: the parsed options, those of `add_weight_options` among them.

    Raises:
        UserError: there is no such model, a file of it cannot be read, or the files do not fit together.
    """
    config = checkpoint.read_config(model_id, "text_encoder")
    model = checkpoint.model_folder(model_id, ["tokenizer/*", "text_encoder/*.json", "text_encoder/*.safetensors"])
    folder, rows = model / "text_encoder", config["vocab_size"]
    files = checkpoint.weight_files(folder, arguments.variant, report.say)
    stored = {name: array for file in files for name, array in open_tensors(file, checkpoint.REMEDY).items()}
    embedding = next((name for name in EMBEDDING_NAMES if name in stored), EMBEDDING_NAMES[0])
    # A wrong file is said before transformers is imported.
    read_tensors(files, {embedding: (rows, width)}, checkpoint.REMEDY)
    check_vocabulary(model / "tokenizer")
    with report.part("imports"):
        import_modules()
    with report.part("reading"):
        tokenizer = load_tokenizer(model / "tokenizer")
    fault = f"{model / 'tokenizer'} has {len(tokenizer):,} tokens, but the text encoder has an embedding of {rows:,}"
    if rows < len(tokenizer):
        raise UserError(f"{fault}; {checkpoint.REMEDY}")
    if rows not in (len(tokenizer), math.ceil(len(tokenizer) / ROWS) * ROWS):
        report.warn(f"{fault}: is it the tokenizer of another model?")
    arrays = [array for array in stored.values() if not isinstance(array, str)]  # all of them, as they fit
    dtype, line = compute_dtype(values_by_dtype(arrays), arguments.dtype, platform=None)
    if line:
        report.say(line)
    with report.part("reading"):
        return tokenizer, load_encoder(folder, files, config, dtype)


def load_encoder(folder: Path, files: Sequence[Path], config: Mapping, dtype: str) -> "T5EncoderModel":
    """Load the text encoder of a model's folder from the files of its weights, which are converted to `dtype`.

    Raises:
        UserError: a file cannot be read, or does not have the encoder's weights.
    """
    from safetensors.torch import load_file
    from transformers import T5Config, T5EncoderModel

    with checkpoint.load_errors(folder):
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        # Of what it does not find, transformers says nothing and takes random numbers.
        encoder, info = T5EncoderModel.from_pretrained(
            None, config=T5Config.from_dict(config), state_dict=weights, dtype=dtype, output_loading_info=True
        )
    for fault in ("missing", "unexpected", "mismatched"):
        if names := info[f"{fault}_keys"]:
            raise UserError(f"{folder}: {len(names)} tensors are {fault}, {min(names)} first; {checkpoint.REMEDY}")
    return encoder


def check_finite(embeddings: "torch.Tensor", model_id: str) -> None:
    """Raise UserError if embeddings have NaN or infinite values, which come from such weights."""
    if not embeddings.isfinite().all():
        raise UserError(f"the text encoder of {model_id} gives NaN or infinite embeddings; {checkpoint.REMEDY}")


def encode(tokenizer: "T5Tokenizer", encoder: "T5EncoderModel", text: str, max_sequence_length: int) -> "torch.Tensor":
    """Encode a text, cut off or padded to [1, max_sequence_length, width]; padding is not masked.

    Source: `CogVideoXPipeline._get_t5_prompt_embeds`. To import the pipeline would take longer than to encode.
    """
    import torch

    tokens = tokenizer(
        text, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return encoder(tokens).last_hidden_state


def text_beyond(tokenizer: "T5Tokenizer", text: str, max_sequence_length: int) -> str:
    """Return the end of `text` that does not fit into `max_sequence_length` tokens, one of which ends every text."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer.decode(tokens[max_sequence_length - 1 :])


if __name__ == "__main__":
    run(main)
