# make quickstart | text | test | test-long | gpu | lint | docs | results
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DIGITS := output/digits
TEXT := output/text
KILLS ?= 200

.PHONY: install quickstart text test test-long gpu browser lint docs results

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

# The main job on real images that scikit-learn carries: a teacher, a student alone, a distilled student.
quickstart: install
	$(BIN)/python tools/train_ours.py --cfg configs/digits/none/res20.yaml
	$(BIN)/python tools/train_ours.py --cfg configs/digits/none/res8.yaml
	$(BIN)/python tools/train_ours.py --cfg configs/digits/dtkd/res20_res8.yaml \
		DISTILLER.TEACHER_CKPT "$(DIGITS)/none,res20/student_latest"
	@echo
	@$(BIN)/python tools/compare.py $(DIGITS)/none,res20 $(DIGITS)/none,res8 $(DIGITS)/dtkd,res20,res8
	@echo "Results, figures of every epoch and checkpoints: $(DIGITS)/"

# The same on the source of Python's own library: small GPTs, by bytes.
text: install
	$(BIN)/python tools/train_ours.py --cfg configs/text/none/gpt4x128.yaml
	$(BIN)/python tools/train_ours.py --cfg configs/text/none/gpt2x64.yaml
	for method in kd dtkd; do \
		$(BIN)/python tools/train_ours.py --cfg configs/text/$$method/gpt4x128_gpt2x64.yaml \
			DISTILLER.TEACHER_CKPT "$(TEXT)/none,gpt4x128/student_latest" || exit; \
	done
	@echo
	@$(BIN)/python tools/compare.py $(TEXT)/none,gpt4x128 $(TEXT)/none,gpt2x64 $(TEXT)/kd,gpt4x128,gpt2x64 \
		$(TEXT)/dtkd,gpt4x128,gpt2x64
	@echo "Results, figures of every epoch and checkpoints: $(TEXT)/"

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu and not browser and not slow'

# Runs that are killed again and again, and what needs a compiler: half an hour.
test-long: install
	KILLS=$(KILLS) $(BIN)/python -m pytest -n 2 -m 'slow and not gpu and not browser' -s

# What works on a GPU, and how fast it is: ten minutes, to output/first_light/first_light.md.
gpu: install
	$(BIN)/python benchmarks/first_light.py

# The report in a real browser: needs chromium and chromedriver.
browser: install
	$(BIN)/python -m pytest -m browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: install
	$(BIN)/python tools/document.py docs

# Tables and charts of every plan with runs on record, and the page that shows them.
results: install
	$(BIN)/python tools/results.py --page docs/reproduction.md
