# make demo: install, then run the three stages on the embedded model. make test: install, then run the tests.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT := stage_outputs
PROMPT := a yellow triangle moving right on a gray background

.PHONY: demo test

demo: $(VENV)/installed
	$(RUN) stage1_text_encoder.py --model_id tiny_model --output_dir $(OUT) --prompt "$(PROMPT)"
	$(RUN) stage2_transformer.py --input_dir $(OUT) --height 64 --width 64 --frames 17 --guidance_scale 2
	$(RUN) stage3_vae_decoder.py --input_dir $(OUT)
	@echo "The video is $(OUT)/output_video.mp4"

test: $(VENV)/installed-for-tests
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/installed-for-tests: tests/requirements.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement tests/requirements.txt
	@touch $@
