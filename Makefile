# Every line below is a command that a person could type.
PYTHON ?= python3
PY := .venv/bin/python
SETUP := .venv/installed
DEMO := runs/demo
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test setup debias results curve case-study preference balance robustness

# The main job on the embedded model: the gap of the base model, after an ordinary recipe and after a vision-centric one.
# Interrupt it and run it again: everything continues where it was.
demo: $(SETUP) data/twins/test_new.jsonl
	$(PY) -m eval.run --model assets/tiny --tasks twins --out $(DEMO)/answers/base
	$(MAKE) --no-print-directory -j2 demo-full-text demo-vision-centric
	$(PY) -m eval.gap $(DEMO)/answers/full-text $(DEMO)/answers/vision-centric --out $(DEMO)
	$(PY) -m eval.report --runs base=$(DEMO)/answers/base full-text=$(DEMO)/answers/full-text \
		vision-centric=$(DEMO)/answers/vision-centric --out $(DEMO)/report.html

demo-%:
	TQDM_POSITION=$(if $(filter full-text,$*),0,1) $(PY) train.py recipes/demo/$(subst -,_,$*).yaml --resume
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/$*-seed0/adapter --tasks twins --out $(DEMO)/answers/$*

data/twins/test_new.jsonl: $(SETUP)
	$(PY) -m data_prep.twins --out data/twins

# Supervision, then preferences from where it ended; the page shows the model before, between and after.
debias: $(SETUP) data/twins/train.pairs.jsonl
	$(PY) train.py recipes/pipelines/demo_debias.yaml --resume
	$(PY) -m eval.run --model assets/tiny --tasks twins --out $(DEMO)/answers/base
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/full-text-seed0/adapter --tasks twins --out $(DEMO)/answers/full-text
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/debias-seed0/adapter --tasks twins --out $(DEMO)/answers/debias
	$(PY) -m eval.gap $(DEMO)/answers/full-text $(DEMO)/answers/debias --out $(DEMO)/debias
	$(PY) -m eval.report --runs base=$(DEMO)/answers/base full-text=$(DEMO)/answers/full-text debias=$(DEMO)/answers/debias \
		--out $(DEMO)/debias/report.html

data/twins/train.pairs.jsonl: data/twins/test_new.jsonl
	$(PY) -m data_prep.pairs from-problems data/twins/train.jsonl --out $@ \
		--kinds other_answer,language_prior,symmetric --model assets/tiny --limit 8000

test: $(SETUP)
	$(PY) -m pytest -q

# The numbers and the figures of the README and recipes/README.md: every recipe of the ladder with three seeds. Nearly two hours on
# two cores; interrupt it and run it again.
LADDER := full-text no-text mix curriculum cross-modal-kl kl-curriculum vision-centric no-text-kl consistency evidence rows
RESULTS := runs/results
comma := ,
empty :=
seeds = $(subst $(empty) $(empty),$(comma),$(foreach seed,0 1 2,$(RESULTS)/$(1)-seed$(seed)))
results: $(SETUP) data/twins/test_new.jsonl
	$(PY) -m eval.run --model assets/tiny --tasks twins,twins_new --out $(RESULTS)/base
	$(MAKE) --no-print-directory -j2 $(foreach seed,0 1 2,$(LADDER:%=ladder-%-seed$(seed)))
	$(PY) -m eval.readme --collect results/demo --task twins --control full-text base=$(RESULTS)/base \
		$(foreach recipe,$(LADDER),$(recipe)=$(call seeds,$(recipe)))
	$(MAKE) --no-print-directory curve case-study

ladder-%:
	$(PY) train.py recipes/demo/$(subst -,_,$(word 1,$(subst -seed, ,$*))).yaml seed=$(word 2,$(subst -seed, ,$*)) --resume
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/$*/adapter --tasks twins,twins_new \
		--seed $(word 2,$(subst -seed, ,$*)) --out $(RESULTS)/$*

# Does the ordinary recipe open the gap over training? Its checkpoints and those of its counterpart, asked in the two views of the gap.
CURVE := full-text no-text
STEPS := 160 320
LAST := 480
plus := +
folders = $(subst $(empty) $(empty),$(plus),$(foreach seed,0 1 2,$(RESULTS)/curve/$(1)-seed$(seed)-step$(2)))
last = $(subst $(comma),$(plus),$(call seeds,$(1)))
curve:
	$(MAKE) --no-print-directory -j2 $(foreach recipe,$(CURVE),$(foreach seed,0 1 2,$(STEPS:%=curve-$(recipe)-seed$(seed)-step%)))
	$(PY) -m eval.curve --task twins --out results/demo/curve.json \
		$(foreach recipe,$(CURVE),$(recipe)=0:$(RESULTS)/base$(foreach step,$(STEPS),$(comma)$(step):$(call folders,$(recipe),$(step)))$(comma)$(LAST):$(call last,$(recipe)))

curve-%:
	$(PY) -m eval.run --model assets/tiny --tasks twins --views both,vision --out $(RESULTS)/curve/$* \
		--adapter $(DEMO)/$(word 1,$(subst -step, ,$*))/checkpoints/checkpoint-$(word 2,$(subst -step, ,$*))

# How much the answers depend on the picture, before and after.
case-study:
	$(PY) -m eval.case_study --model assets/tiny --tasks twins --limit 600 --out $(RESULTS)/case-study \
		--adapter full-text=$(DEMO)/full-text-seed0/adapter --adapter cross-modal-kl=$(DEMO)/cross-modal-kl-seed0/adapter \
		--adapter no-text=$(DEMO)/no-text-seed0/adapter
	cp $(RESULTS)/case-study/case_study.json $(RESULTS)/case-study/case_study.svg results/demo/

# Preferences from the adapters of full-text, with three seeds. About half an hour on two cores, after those adapters.
PREFERENCE := dpo-sft mdpo napo sympmo debias
preference: $(SETUP) data/twins/train.pairs.jsonl
	$(PY) -m eval.run --model assets/tiny --tasks twins,twins_new --out $(RESULTS)/base
	$(MAKE) --no-print-directory -j2 $(foreach seed,0 1 2,ladder-full-text-seed$(seed))
	$(MAKE) --no-print-directory -j2 $(foreach seed,0 1 2,$(PREFERENCE:%=ladder-%-seed$(seed)))
	$(PY) -m eval.readme --collect results/preference --task twins --control dpo-sft base=$(RESULTS)/base \
		$(foreach recipe,full-text $(PREFERENCE),$(recipe)=$(call seeds,$(recipe)))
	$(PY) -m eval.run --model assets/tiny $(CASE) --out $(RESULTS)/case/base
	$(MAKE) --no-print-directory -j2 $(foreach seed,0 1 2,$(foreach recipe,full-text $(PREFERENCE),case-$(recipe)-seed$(seed)))
	$(PY) -m eval.case_study --out $(RESULTS)/preference-case-study --runs base=$(RESULTS)/case/base \
		$(foreach recipe,full-text $(PREFERENCE),$(recipe)=$(subst results/,results/case/,$(call seeds,$(recipe))))
	cp $(RESULTS)/preference-case-study/case_study.json $(RESULTS)/preference-case-study/case_study.svg results/preference/

CASE := --tasks twins --limit 600 --views both,vision,text,blind,white,shuffled,conflict,other_facts
case-%:
	$(PY) -m eval.run --model assets/tiny --adapter $(DEMO)/$*/adapter $(CASE) --out $(RESULTS)/case/$*

# Balance methods and their controls, on the mix and on full text, three seeds each: about three hours on two cores.
# random-factors follows the run of cggm, so it comes last.
BALANCE := plain plain-long miles cggm mnl unimodal-losses msam sam lnln corruption modality-dropout ogm-ge
each = $(foreach seed,0 1 2,$(1:%=balance-%-on-mix-seed$(seed)) $(1:%=balance-%-on-full-text-seed$(seed)))
balance: $(SETUP) data/twins/test_new.jsonl
	$(PY) -m eval.run --model assets/tiny --tasks twins --out $(RESULTS)/base-twins
	$(MAKE) --no-print-directory -j2 $(call each,$(BALANCE))
	$(MAKE) --no-print-directory -j2 $(call each,random-factors)
	$(PY) -m eval.readme --collect results/balance_mix --task twins --control plain plain-long=$(call seeds,plain-long) \
		$(foreach recipe,$(filter-out plain-long,$(BALANCE)) random-factors,$(recipe)=$(call seeds,$(recipe)))
	$(PY) -m eval.readme --collect results/balance_full_text --task twins --control plain-full-text \
		plain-long-full-text=$(call seeds,plain-long-full-text) \
		$(foreach recipe,$(filter-out plain-long,$(BALANCE)) random-factors,$(recipe)-full-text=$(call seeds,$(recipe)-full-text))
	$(MAKE) --no-print-directory robustness
	$(PY) -m benchmarks.balance_cost --out results/balance_mix/cost.json

full_text_options = data.mixture=mixtures/twins_both.yaml name=$(1)-full-text \
	$(if $(filter random-factors,$(1)),balance.of=runs/demo/cggm-full-text-seed{seed})
balance-%:
	$(MAKE) --no-print-directory RECIPE=$(word 1,$(subst -on-, ,$*)) ON=$(word 2,$(subst -on-, ,$(subst -seed, -seed,$*))) \
		SEED=$(lastword $(subst -seed, ,$*)) balance-run
balance-run:
	$(PY) train.py recipes/demo/$(subst -,_,$(RECIPE)).yaml seed=$(SEED) --resume $(if $(filter full-text,$(ON)),$(call full_text_options,$(RECIPE)))
	$(PY) -m eval.run --model assets/tiny --tasks twins --seed $(SEED) \
		--adapter $(DEMO)/$(RECIPE)$(if $(filter full-text,$(ON)),-full-text)-seed$(SEED)/adapter \
		--out $(RESULTS)/$(RECIPE)$(if $(filter full-text,$(ON)),-full-text)-seed$(SEED)

# How accuracy falls when more and more of the words, or of the picture, is missing.
ROBUST := plain corruption lnln
adapters = $(subst $(empty) $(empty),$(comma),$(foreach seed,0 1 2,$(DEMO)/$(1)-seed$(seed)/adapter))
robustness:
	$(MAKE) --no-print-directory -j2 $(ROBUST:%=robustness-%)
	$(PY) -m eval.robustness --modality text,image,both --out results/balance_mix/robustness.json \
		--runs $(foreach recipe,$(ROBUST),$(recipe)=$(RESULTS)/robustness-$(recipe)/answers/$(recipe))

robustness-%:
	$(PY) -m eval.robustness --model assets/tiny --adapter $*=$(call adapters,$*) --tasks twins --limit 300 \
		--modality text,image,both --out $(RESULTS)/robustness-$*

# A virtual environment of its own, renewed when requirements.txt changes.
setup: $(SETUP)
$(SETUP): requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@
