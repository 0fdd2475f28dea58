# Every line below is a command that a person could type.
PYTHON ?= python3
PY := .venv/bin/python
SETUP := .venv/installed
DEMO := runs/demo
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test setup results demo-control demo-vision-centric

# The main job on the embedded model: the gap of the base model, after an ordinary recipe and after a vision-centric one.
# Interrupt it and run it again: everything continues where it was.
demo: $(SETUP) data/twins/test_new.jsonl
	$(PY) -m eval.run --model assets/tiny --tasks twins --out $(DEMO)/answers/base
	$(MAKE) --no-print-directory -j2 demo-control demo-vision-centric
	$(PY) -m eval.gap $(DEMO)/answers/control $(DEMO)/answers/vision-centric --out $(DEMO)
	$(PY) -m eval.report --runs base=$(DEMO)/answers/base control=$(DEMO)/answers/control \
		vision-centric=$(DEMO)/answers/vision-centric --out $(DEMO)/report.html

demo-control:
	TQDM_POSITION=0 $(PY) train.py recipes/demo/control.yaml --resume
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/control-seed0/adapter --tasks twins --out $(DEMO)/answers/control

demo-vision-centric:
	TQDM_POSITION=1 $(PY) train.py recipes/demo/vision_centric.yaml --resume
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/vision-centric-seed0/adapter --tasks twins --out $(DEMO)/answers/vision-centric

data/twins/test_new.jsonl: $(SETUP)
	$(PY) -m data_prep.twins --out data/twins

test: $(SETUP)
	$(PY) -m pytest -q

# The numbers and the figure of the README: both demo recipes with three seeds. About 20 minutes on two cores.
RUNS := $(foreach seed,0 1 2,control-seed$(seed) vision-centric-seed$(seed))
results: $(SETUP) data/twins/test_new.jsonl
	$(PY) -m eval.run --model assets/tiny --tasks twins,twins_new --out runs/results/base
	$(MAKE) --no-print-directory -j2 $(RUNS:%=results-%)
	$(PY) -m eval.readme --collect results/demo --task twins base=runs/results/base \
		control=runs/results/control-seed0,runs/results/control-seed1,runs/results/control-seed2 \
		vision-centric=runs/results/vision-centric-seed0,runs/results/vision-centric-seed1,runs/results/vision-centric-seed2

results-%:
	$(PY) train.py recipes/demo/$(subst -,_,$(word 1,$(subst -seed, ,$*))).yaml seed=$(word 2,$(subst -seed, ,$*)) --resume
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/$*/adapter --tasks twins,twins_new \
		--seed $(word 2,$(subst -seed, ,$*)) --out runs/results/$*

# A virtual environment of its own, renewed when requirements.txt changes.
setup: $(SETUP)
$(SETUP): requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@
