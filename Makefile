# The commands of this project. `make` or `make help` lists them.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT := stage_outputs
PROMPT := a yellow triangle moving right on a gray background
MOTION := moving right
MODEL := zai-org/CogVideoX1.5-5B
IMAGE :=
OPTIONS :=

# One word of a shell, whatever is in it.
quoted = '$(subst ','\'',$1)'

.DEFAULT_GOAL := help
.PHONY: help demo demo-i2v video lint test-fast test clean

help:  ## list the targets
	@echo "Targets. All but help and clean install at first what they need."
	@awk -F ':.*##' '/^[a-z0-9-]+:.*##/ { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Variables, with their values:'
	@echo '  PROMPT='$(call quoted,"$(PROMPT)")
	@echo '  MOTION='$(call quoted,"$(MOTION)")', of demo-i2v'
	@echo '  OUT=$(OUT), the folder of the outputs; PYTHON=$(PYTHON)'
	@echo '  MODEL=$(MODEL), of video; its OPTIONS are those of stage 2,'
	@echo '  and its IMAGE is the picture that some models need'

demo: $(VENV)/installed  ## run the stages on the tiny model; says where the video is
	$(RUN) stage1_text_encoder.py --model_id tiny_model --output_dir $(OUT) --prompt $(call quoted,$(PROMPT))
	$(RUN) stage2_transformer.py --input_dir $(OUT)
	$(RUN) stage3_vae_decoder.py --input_dir $(OUT)
	@echo "The video is $(OUT)/output_video.mp4"

demo-i2v: $(VENV)/installed  ## draw a picture and let the tiny image-to-video model animate it
	mkdir -p $(OUT)
	$(RUN) -m tools.moving_shapes --output $(OUT)/picture.png
	$(RUN) stage1_text_encoder.py --model_id tiny_model_i2v --output_dir $(OUT) --image $(OUT)/picture.png --prompt $(call quoted,$(MOTION))
	$(RUN) stage2_transformer.py --input_dir $(OUT)
	$(RUN) stage3_vae_decoder.py --input_dir $(OUT)
	@echo "The picture is $(OUT)/picture.png, the video $(OUT)/output_video.mp4"

video: $(VENV)/installed  ## the same with any model: make video MODEL=... PROMPT="..."
	$(RUN) stage1_text_encoder.py --model_id $(call quoted,$(MODEL)) --output_dir $(OUT) --prompt $(call quoted,$(PROMPT)) $(if $(IMAGE),--image $(call quoted,$(IMAGE)))
	$(RUN) stage2_transformer.py --input_dir $(OUT) $(OPTIONS)
	$(RUN) stage3_vae_decoder.py --input_dir $(OUT)
	@echo "The video is $(OUT)/output_video.mp4"

lint: $(VENV)/installed-for-tests  ## check style, format, types and imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

test-fast: $(VENV)/installed-for-tests  ## run the quick tests: under two minutes on two cores
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test: lint  ## check everything: lint, and all tests
	$(RUN) -m pytest -n 2 --dist worksteal

clean:  ## remove caches; .venv and stage_outputs stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: requirements.txt
	@test -x $(RUN) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/installed-for-tests: tests/requirements.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement tests/requirements.txt
	@touch $@
