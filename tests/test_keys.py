"""Every key of a recipe and of the DeepSpeed JSON changes something, or is refused where it
cannot.

KEYS has a line for every field of every class of `pipeline/recipe.py`: a new one fails here until
it is said what it does, by a value that changes what one of the observers sees, or by the test that
shows it.
"""

import ast
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.recipe
from pipeline import hub_name
from pipeline.data.bad_lines import BadLines
from pipeline.data.batches import prefetch
from pipeline.data.reader import read_documents
from pipeline.engine.config import resolve_ds_config, resolve_fsdp_config
from pipeline.engine.ds_keys import (
    UNSUPPORTED_ZERO,
    UNUSED,
    UNUSED_ZERO,
    USED,
    ZERO_STAGES,
    zero_problems,
)
from pipeline.engine.optimizer import weight_groups
from pipeline.errors import UserError
from pipeline.methods.anchor import Anchor
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.load import build_model, empty_model, load_config
from pipeline.recipe import Recipe
from pipeline.run.recipe_file import load_recipe
from pipeline.run.train import learning_rate
from pipeline.shard import ParameterShards

HERE = Path(__file__).parent
TINY = "{model_type: gpt2, n_embd: 12, n_layer: 2, n_head: 2, n_positions: 20, vocab_size: 300}"


@dataclasses.dataclass
class Change:
    """An override that changes what `seen` sees of a recipe. beside: overrides before it."""

    override: str
    seen: Callable[[Recipe], Any]
    beside: tuple[str, ...] = ()


def documents(recipe):
    return [
        list(read_documents(domain, side, BadLines(recipe.data.bad_lines)))
        for domain in recipe.data.domains.values()
        for side in ("train", "heldout")
    ]


def model(recipe):
    config = load_config(recipe.model, recipe.model.train_tokenizer)
    net = build_model(recipe.model, config, None, recipe.seed)
    weights = {n: (p.sum().item(), tuple(p.shape)) for n, p in net.named_parameters()}
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    attention = net.config._attn_implementation
    return weights, trained, attention, net.is_gradient_checkpointing, type(net)


def step(recipe):
    """What a masked step of the optimizer does to a small model; one forward on fixed tokens."""
    net = build_model(recipe.model, load_config(recipe.model, 300), None, 0)
    mask = GradientMask(net, recipe.mask, recipe.stage_seed(1)) if recipe.mask.enabled else None
    o = recipe.optimizer
    adam = torch.optim.AdamW(
        weight_groups(net, o.weight_decay), lr=o.lr, betas=tuple(o.betas), eps=o.eps
    )
    shards = ParameterShards(net)
    tokens = torch.arange(40).reshape(2, 20) * 7 % 300
    for number in (1, 2):
        if mask and mask.recorder:
            with mask.recording():
                loss = net(input_ids=tokens, labels=tokens).loss
        else:
            loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if mask:
            mask.apply(shards, number)
            with mask.hold(shards):
                adam.step()
        else:
            adam.step()
        adam.zero_grad()
    return [p.detach().double().sum().item() for p in net.parameters()]


def schedule(recipe):
    return [
        learning_rate(recipe.optimizer, s.lr or recipe.optimizer.lr, i, 10)
        for s in recipe.stages
        for i in range(1, 11)
    ]


def engine(recipe):
    if recipe.engine.kind == "fsdp":
        return resolve_fsdp_config(recipe, 2, "cuda")
    return resolve_ds_config({"zero_optimization": {"stage": 2}}, recipe, 2, "cuda")


def adapters(recipe):
    net = empty_model(recipe.model, load_config(recipe.model, 300))
    layers = [(n, m) for n, m in net.named_modules() if hasattr(m, "lora_A")]
    return [(n, str(m), m.scaling) for n, m in layers]


def prompt(recipe):
    net = empty_model(recipe.model, load_config(recipe.model, 300))
    return [(n, p.shape) for n, p in net.named_parameters() if p.requires_grad]


CAUSAL = ("model.objective=causal",)
PROMPT = (*CAUSAL, "data.packing=false", "mask.enabled=false")
LORA = (*CAUSAL, "model.lora={}")
FSDP = ("engine.kind=fsdp",)
ROBERTA = (
    "model.config={model_type: roberta, hidden_size: 12, num_hidden_layers: 1, "
    "num_attention_heads: 2, intermediate_size: 8, max_position_embeddings: 24}",
)
OF_THE_VOCABULARY = ("model.config={model_type: gpt2, n_embd: 12, n_layer: 1, n_head: 2}",)
FILE = "data.domains.a."
STOP = "stages=[{domain: a, steps: 3, stop: {loss: 2.0, steps: 2}}]"


# A name alone is that of the test that shows it, in any file.
def extra_rows(recipe):
    return Anchor(recipe).rows if recipe.anchor else 0


def anchor_sequences(recipe):
    return Anchor(recipe)._sequences()


ANCHOR = ("anchor={fraction: 0.5}",)
KEYS: dict[str, str | Change] = {
    "Recipe.name": Change("name=other", lambda r: r.name),
    "Recipe.model": "test_whole_weights_pass",
    "Recipe.data": Change(FILE + "max_documents=20", documents),
    "Recipe.stages": Change("stages=[{domain: a, steps: 3, lr: 0.5}]", schedule),
    "Recipe.anchor": Change("anchor={fraction: 0.5}", extra_rows),
    "Recipe.start_from": "test_every_stage_may_start_from_the_base",
    "Recipe.olora": "test_penalties_add_their_gradient_to_every_engines_pieces",
    "Recipe.l2_to_start": "test_penalties_add_their_gradient_to_every_engines_pieces",
    "Recipe.hft": "test_what_a_method_freezes_does_not_move_and_all_else_does",
    "Recipe.ssu": "test_what_a_method_freezes_does_not_move_and_all_else_does",
    "Recipe.mask": Change("mask.threshold=0.2", step, CAUSAL),
    "Recipe.optimizer": Change("optimizer.lr=0.1", step, CAUSAL),
    "Recipe.train": Change("train.batch_size=8", engine),
    "Recipe.engine": Change("engine.kind=fsdp", engine),
    "Recipe.evaluate": "test_a_run_is_measured_within_and_what_failed_is_retried_alone",
    "Recipe.bad_steps": "test_a_bad_step_is_as_if_it_had_never_been",
    "Recipe.guard": "test_the_guard_ends_a_stage_that_forgets_and_publishes_what_was_before",
    "Recipe.seed": Change("seed=3", model, CAUSAL),
    "Recipe.track": "test_steps_and_results_are_tracked",
    "Model.path": "test_whole_weights_pass",
    "Model.config": Change("model.config.n_layer=1", model, CAUSAL),
    "Model.overrides": Change("model.overrides={n_inner: 7}", model, CAUSAL),
    "Model.revision": "test_configuration_and_revision_reach_the_hub",
    "Model.initialize_missing": "test_missing_weights_are_initialised_on_demand_from_the_seed",
    "Model.initial_positions": Change("model.initial_positions=sinusoidal", model, ROBERTA),
    "Model.tokenizer": "test_bpe_files_alone_become_the_right_tokenizer",
    "Model.train_tokenizer": Change(
        "model.train_tokenizer=310", model, (*CAUSAL, *OF_THE_VOCABULARY)
    ),
    "Model.objective": Change("model.objective=causal", model, ROBERTA),
    "Model.lora": Change("model.lora={}", adapters, CAUSAL),
    "Model.prompt": Change("model.prompt={}", prompt, PROMPT),
    "Prompt.tokens": Change("model.prompt.tokens=3", prompt, (*PROMPT, "model.prompt={}")),
    "Prompt.progressive": "test_each_stage_adds_a_prompt_before_the_frozen_earlier_ones",
    "Model.gradient_checkpointing": Change("model.gradient_checkpointing=true", model, CAUSAL),
    "Model.attention": Change("model.attention=eager", model, CAUSAL),
    "Lora.r": Change("model.lora.r=2", adapters, LORA),
    "Lora.alpha": Change("model.lora.alpha=8", adapters, LORA),
    "Lora.dropout": Change("model.lora.dropout=0.5", adapters, LORA),
    "Lora.targets": Change("model.lora.targets=[c_attn]", adapters, LORA),
    "Lora.experts": "test_each_expert_counts_by_its_share",
    "Lora.quantize": "test_an_adapter_equals_the_reference",
    "Domain.embedded": "test_embedded_corpora_are_code_without_comments_and_come_from_the_cache",
    "Domain.files": Change(FILE + "files=[other.jsonl]", documents),
    "Domain.hub": "test_a_hub_folder_has_the_same_rules",
    "Domain.split": "test_a_hub_folder_has_the_same_rules",
    "Domain.heldout_split": "test_a_hub_folder_has_the_same_rules",
    "Domain.hub_config": "test_configuration_and_revision_reach_the_hub",
    "Domain.revision": "test_configuration_and_revision_reach_the_hub",
    "Domain.text_field": Change(FILE + "text_field=other", documents),
    "Domain.instruction": Change(
        FILE + "instruction={prompt: text, response: other}", documents, CAUSAL
    ),
    "Domain.chat_field": "test_chats_are_read_from_jsonl_and_parquet_and_bad_rows_located",
    "Domain.txt_documents": Change(
        FILE + "txt_documents=line", documents, (FILE + "files=[lines.txt]",)
    ),
    "Domain.heldout_files": Change(FILE + "heldout_files=[other.jsonl]", documents),
    "Domain.heldout_fraction": Change(FILE + "heldout_fraction=0.5", documents),
    "Domain.max_documents": Change(FILE + "max_documents=20", documents),
    "Domain.sample": Change(FILE + "sample=0.5", documents),
    "Domain.sample_seed": Change(FILE + "sample_seed=3", documents, (FILE + "sample=0.5",)),
    "Domain.deduplicate": "test_duplicates_are_left_out_over_all_files",
    "Domain.decontaminate": "test_documents_with_text_of_an_evaluation_are_left_out",
    "Domain.task": "test_rows_become_prompts_with_the_options_and_are_drawn_by_hash",
    "Task.instruction": "test_rows_become_prompts_with_the_options_and_are_drawn_by_hash",
    "Task.labels": "test_a_mistake_is_one_message_with_the_place_and_the_fix",
    "Task.text": "test_a_mistake_is_one_message_with_the_place_and_the_fix",
    "Task.label": "test_a_mistake_is_one_message_with_the_place_and_the_fix",
    "Task.leave_out": "test_long_texts_and_rows_without_a_label_are_cut_and_left_out",
    "Task.list_options": "test_rows_become_prompts_with_the_options_and_are_drawn_by_hash",
    "Task.keep": "test_long_texts_and_rows_without_a_label_are_cut_and_left_out",
    "Task.max_words": "test_long_texts_and_rows_without_a_label_are_cut_and_left_out",
    "Task.train_rows": "test_rows_become_prompts_with_the_options_and_are_drawn_by_hash",
    "Task.test_rows": "test_rows_become_prompts_with_the_options_and_are_drawn_by_hash",
    "Instruction.prompt": "test_fields_are_configurable_and_bad_rows_counted",
    "Instruction.input": "test_fields_are_configurable_and_bad_rows_counted",
    "Instruction.response": "test_fields_are_configurable_and_bad_rows_counted",
    "Data.domains": Change(FILE + "files=[other.jsonl]", documents),
    "Data.prepare": "test_a_corpus_is_its_documents_tokenized",
    "Data.prepared": "test_the_second_time_nothing_is_read",
    "Data.sequence_length": "test_a_run_is_measured_within_and_what_failed_is_retried_alone",
    "Data.masking": "test_the_exact_number_of_ordinary_tokens_is_chosen",
    "Data.heldout_masking": "test_the_masks_do_not_depend_on_the_seed_of_the_run",
    "Data.whole_word": "test_whole_words_are_chosen_until_the_budget_is_reached",
    "Data.template": "test_only_the_response_is_learnt",
    "Data.packing": "test_without_packing_a_row_has_one_document",
    "Data.cross_document": "test_the_past_does_not_see_the_future",
    "Data.keep_apart": "test_a_family_that_ignores_what_it_is_told_is_found_out",
    "Data.shuffle_window": "test_documents_come_from_several_shards_and_shuffled",
    "Data.open_shards": "test_documents_come_from_several_shards_and_shuffled",
    "Data.bad_lines": "test_too_many_broken_rows_stop_with_their_places",
    "Data.heldout_sequences": "test_the_losses_by_sequence_add_up_to_the_mean",
    "Data.prefetch": "test_prefetching_goes_so_many_steps_ahead",
    "Stage.domain": Change("stages=[{domain: {a: 2}, steps: 3}]", lambda r: r.stages[0].domain),
    "Stage.steps": "test_a_run_is_measured_within_and_what_failed_is_retried_alone",
    "Stage.epochs": "test_epochs_of_examples_are_counted_not_estimated",
    "Stage.tokens": "test_a_stage_that_wants_more_than_its_repetitions_give_is_refused",
    "Stage.max_repetitions": ("test_a_stage_that_wants_more_than_its_repetitions_give_is_refused"),
    "Stage.replay": ("test_replay_reads_a_share_of_the_earlier_stages_beside_every_new_document"),
    "Stage.stop": "test_a_stage_ends_where_its_target_is_reached",
    "Recipe.stop": Change("stop={loss: 2.0, domain: a, steps: 2}", lambda r: r.stop_of(1), ()),
    "Stop.loss": "test_a_stage_ends_where_its_target_is_reached",
    "Stop.domain": Change(
        "stages=[{domain: a, steps: 3, stop: {loss: 2.0, steps: 2, domain: b}}]",
        lambda r: r.stop_of(1),
        ("data.domains.b={files: [other.jsonl]}", STOP),
    ),
    "Stop.steps": "test_a_stage_ends_where_its_target_is_reached",
    "Stage.lr": Change("stages=[{domain: a, steps: 3, lr: 0.5}]", schedule),
    "Stage.evaluate_every": "test_a_run_is_measured_within_and_what_failed_is_retried_alone",
    "Mask.enabled": Change("mask.enabled=false", step, CAUSAL),
    "Mask.threshold": Change("mask.threshold=0.2", step, CAUSAL),
    "Mask.components": Change("mask.components=[ffn]", step, CAUSAL),
    "Mask.normalize": Change("mask.normalize=token", step, CAUSAL),
    "Mask.rule": Change("mask.rule=quantile", step, (*CAUSAL, "mask.threshold=0.3")),
    "Mask.split_fused": Change("mask.split_fused=true", step, CAUSAL),
    "Mask.criterion": Change("mask.criterion=weight", step, CAUSAL),
    "Mask.random_redraw": Change(
        "mask.random_redraw=step", step, (*CAUSAL, "mask.criterion=random")
    ),
    "Mask.update": Change(
        "mask.update=strict", step, (*CAUSAL, "optimizer.weight_decay=0.5", "optimizer.lr=0.1")
    ),
    "Mask.clusters": "test_rows_have_the_mean_score_of_their_group",
    "Mask.cluster_by": "test_rows_that_are_large_in_the_same_texts_are_a_group",
    "Mask.refresh": "test_which_step_selects_the_rows_of_a_step",
    "Mask.calibration": Change(
        "mask.calibration=8",
        lambda r: -(-r.mask.calibration // r.train.batch_size),
        ("mask.refresh=stage",),
    ),
    "Mask.backward": "test_which_step_selects_the_rows_of_a_step",
    "Mask.from_stage": "test_the_engine_measures_what_the_published_checkpoint_has",
    "Anchor.text": "test_an_anchor_in_a_run",
    "Anchor.loss": "test_an_anchor_in_a_run",
    "Anchor.fraction": Change("anchor.fraction=1.0", extra_rows, ANCHOR),
    "Anchor.weight": "test_an_anchor_without_weight_is_none_bit_for_bit",
    "Anchor.teacher": "test_an_anchor_in_a_run",
    "Anchor.cache": "test_the_cache_of_the_likeliest_tokens_is_close_to_the_teacher",
    "Anchor.tokens": Change("anchor.tokens=2k", anchor_sequences, ANCHOR),
    "Anchor.mask_anchor": "test_the_mask_may_leave_the_anchor_out",
    "OLora.weight": "test_penalties_add_their_gradient_to_every_engines_pieces",
    "L2ToStart.weight": "test_penalties_add_their_gradient_to_every_engines_pieces",
    "L2ToStart.start": "test_the_start_of_the_run_is_the_base",
    "SourceColumns.text": "test_source_columns_in_a_run",
    "SourceColumns.share": "test_source_columns_in_a_run",
    "SourceColumns.sequences": "test_source_columns_in_a_run",
    "Lora.composed": "test_each_adapter_counts_by_the_cosine_of_a_text_to_its_key",
    "Recipe.mocl": "test_every_engine_and_split_publishes_the_same",
    "Mocl.weight": "test_a_prediction_has_the_distance_of_its_row",
    "Lora.incremental": "test_incremental_adapters_stay_as_they_were",
    "Recipe.das": "test_soft_masks_and_penalties_on_shards_equal_one_process",
    "Recipe.ewc": "test_soft_masks_and_penalties_on_shards_equal_one_process",
    "Recipe.kd": "test_each_loss_equals_a_plain_loop",
    "Recipe.derpp": "test_each_loss_equals_a_plain_loop",
    "Das.sequences": "test_importance_is_the_same_however_the_text_is_shared",
    "Das.dropout": "test_importance_is_the_same_however_the_text_is_shared",
    "Das.contrast": "test_each_loss_equals_a_plain_loop",
    "Ewc.weight": "test_soft_masks_and_penalties_on_shards_equal_one_process",
    "Distill.weight": "test_each_loss_equals_a_plain_loop",
    "Distill.temperature": "test_each_loss_equals_a_plain_loop",
    "DerPlusPlus.sequences": "test_each_loss_equals_a_plain_loop",
    "DerPlusPlus.fraction": "test_each_loss_equals_a_plain_loop",
    "DerPlusPlus.alpha": "test_each_loss_equals_a_plain_loop",
    "DerPlusPlus.beta": "test_each_loss_equals_a_plain_loop",
    "Recipe.entropy_gate": "test_the_gradients_of_the_gates_are_those_by_hand_under_every_engine",
    "Recipe.ema": "test_averages_are_their_closed_forms_under_every_engine",
    "Recipe.publish_average": "test_averages_are_their_closed_forms_under_every_engine",
    "EntropyGate.tokens": "test_the_gradients_of_the_gates_are_those_by_hand_under_every_engine",
    "Recipe.hat_adapter": "test_gates_claim_ranks_as_a_plain_loop_does_on_every_engine",
    "HatAdapter.lr": "test_gates_claim_ranks_as_a_plain_loop_does_on_every_engine",
    "HatAdapter.sparsity": "test_gates_claim_ranks_as_a_plain_loop_does_on_every_engine",
    "HatAdapter.steepness": "test_gates_claim_ranks_as_a_plain_loop_does_on_every_engine",
    "Recipe.mofo": "test_only_the_entries_with_the_largest_momentum_move",
    "Recipe.epi": "test_every_text_is_answered_by_the_adapter_that_it_finds",
    "Epi.sequences": "test_every_text_is_answered_by_the_adapter_that_it_finds",
    "Recipe.pseudo_replay": "test_the_model_writes_earlier_tasks_and_answers_them",
    "PseudoReplay.sequences": "test_the_model_writes_earlier_tasks_and_answers_them",
    "PseudoReplay.fraction": "test_the_model_writes_earlier_tasks_and_answers_them",
    "PseudoReplay.weight": "test_the_model_writes_earlier_tasks_and_answers_them",
    "Mofo.share": "test_only_the_entries_with_the_largest_momentum_move",
    "Ema.decay": "test_averages_are_their_closed_forms_under_every_engine",
    "PublishAverage.start": "test_averages_are_their_closed_forms_under_every_engine",
    "Distill.teacher": "test_the_teacher_is_the_base_or_what_was_published_last",
    "Optimizer.name": Change("optimizer.name=adamw8bit", engine, ("mask.update=strict",)),
    "Optimizer.lr": Change("optimizer.lr=0.1", step, CAUSAL),
    "Optimizer.betas": Change("optimizer.betas=[0.1, 0.2]", step, CAUSAL),
    "Optimizer.eps": Change("optimizer.eps=1.0", step, CAUSAL),
    "Optimizer.weight_decay": Change(
        "optimizer.weight_decay=0.5", step, (*CAUSAL, "optimizer.lr=0.1")
    ),
    "Optimizer.schedule": Change("optimizer.schedule=cosine", schedule),
    "Optimizer.warmup": Change("optimizer.warmup=0.5", schedule),
    "Train.batch_size": Change("train.batch_size=8", engine),
    "Train.micro_batch_size": Change("train.micro_batch_size=1", engine),
    "Train.gradient_clipping": Change("train.gradient_clipping=0.5", engine),
    "Train.precision": Change("train.precision=fp16", engine),
    "BadSteps.policy": "test_a_bad_step_is_as_if_it_had_never_been",
    "BadSteps.budget": "test_the_budget_and_the_spike_rule",
    "BadSteps.spike": "test_the_budget_and_the_spike_rule",
    "BadSteps.window": "test_the_budget_and_the_spike_rule",
    "Guard.domain": "test_the_guard_ends_a_stage_that_forgets_and_publishes_what_was_before",
    "Guard.max_rise": "test_what_the_guard_does",
    "Guard.benchmark": "test_what_the_guard_does",
    "Guard.max_fall": "test_what_the_guard_does",
    "Guard.steps": "test_what_the_guard_does",
    "Guard.action": "test_what_the_guard_does",
    "Guard.against": "test_what_the_guard_does",
    "Train.compile": "test_every_engine_trains_compiled_as_without",
    "Train.chunked_loss": "test_chunks_give_the_losses_and_weights_of_the_whole",
    "Train.compare_replicas": "test_a_flipped_bit_is_found_and_its_rank_named",
    "Train.publish_dtype": "test_a_killed_run_continues_and_ends_like_an_unbroken_one",
    "Engine.kind": Change("engine.kind=fsdp", engine),
    "Engine.replicas": Change("engine.replicas=2", engine, FSDP),
    "Engine.reshard_after_forward": Change("engine.reshard_after_forward=false", engine, FSDP),
    "Recipe.resume": "test_a_stage_is_saved_when_the_recipe_says",
    "Resume.steps": "test_a_stage_is_saved_when_the_recipe_says",
    "Resume.minutes": "test_a_stage_is_saved_when_the_recipe_says",
    "Resume.keep": "test_a_stage_is_saved_when_the_recipe_says",
    "Resume.keep_every": "test_a_stage_is_saved_when_the_recipe_says",
    "Resume.on_error": "test_a_full_disk_costs_no_checkpoint_and_the_recipe_says_what_then",
    "Resume.grace": "test_the_grace_period_and_a_second_signal_end_at_once",
    "Evaluation.domains": Change(
        "evaluate.domains=[a]",
        lambda r: r.heldout_domains(),
        ("data.domains.b={files: [other.jsonl]}", "stages=[{domain: [a, b], steps: 3}]"),
    ),
    "Evaluation.batch_size": "test_it_repeats_to_the_bit_and_does_not_depend_on_the_shares",
    "Evaluation.overlap": "test_it_repeats_to_the_bit_and_does_not_depend_on_the_shares",
    "Evaluation.benchmarks": "test_the_numbers_are_those_of_the_lm_eval_command",
    "Evaluation.benchmark_files": "test_the_numbers_are_those_of_the_lm_eval_command",
    "Evaluation.unreachable": "test_an_unreachable_hub",
    "Evaluation.humaneval": "test_a_run_is_measured_within_and_what_failed_is_retried_alone",
    "Evaluation.end_tasks": "test_the_command_measures_any_checkpoint",
    "EndTasks.tasks": "test_the_command_measures_any_checkpoint",
    "EndTasks.files": "test_the_command_measures_any_checkpoint",
    "EndTasks.after": "test_which_tasks_follow_which_stage",
    "EndTasks.seeds": "test_a_measurement_continues_whatever_the_shares",
    "EndTasks.score": "test_labels_are_scored_by_their_likelihood",
    "EndTasks.sequence_length": "test_every_setting_of_the_training_counts",
    "EndTasks.batch_size": "test_every_setting_of_the_training_counts",
    "EndTasks.lr": "test_every_setting_of_the_training_counts",
    "EndTasks.weight_decay": "test_every_setting_of_the_training_counts",
    "EndTasks.patience": "test_every_setting_of_the_training_counts",
    "EndTasks.new_pooler": "test_what_failed_is_said_and_the_rest_is_kept",
    "EndTasks.processes": "test_jobs_run_side_by_side_in_processes_of_their_own",
    "EndTask.task": "test_a_bad_row_is_named",
    "EndTask.domain": "test_which_tasks_follow_which_stage",
    "EndTask.files": "test_a_bad_row_is_named",
    "EndTask.hub": "test_a_hub_folder_of_an_end_task_has_the_same_rules",
    "EndTask.text_field": "test_fields_labels_and_absent_terms_are_configurable",
    "EndTask.term_field": "test_fields_labels_and_absent_terms_are_configurable",
    "EndTask.label_field": "test_fields_labels_and_absent_terms_are_configurable",
    "EndTask.labels": "test_fields_labels_and_absent_terms_are_configurable",
    "EndTask.absent_terms": "test_fields_labels_and_absent_terms_are_configurable",
    "EndTask.metric": "test_fields_labels_and_absent_terms_are_configurable",
    "EndTask.epochs": "test_every_setting_of_the_training_counts",
    "EndTask.lr": "test_every_setting_of_the_training_counts",
    "Evaluation.precision": "test_a_checkpoint_is_measured_in_the_recipes_precision",
    "Evaluation.answers": "test_answers_are_greedy_however_they_are_batched",
    "Answers.max_new_tokens": ("test_answers_are_greedy_however_they_are_batched"),
    "Answers.constrained": ("test_answers_are_greedy_however_they_are_batched"),
    "Answers.batch_size": ("test_answers_are_greedy_however_they_are_batched"),
    "Answers.asked": "test_tasks_are_asked_when_they_have_been_seen",
    "Answers.limit": "test_a_run_of_tasks_has_the_matrix_of_its_answers",
    "Benchmark.task": "test_the_numbers_are_those_of_the_lm_eval_command",
    "Benchmark.shots": "test_the_numbers_are_those_of_the_lm_eval_command",
    "Benchmark.limit": "test_the_numbers_are_those_of_the_lm_eval_command",
    "Benchmark.files": "test_wrong_files",
    "Benchmark.metric": "test_wrong_metric_and_too_many_shots",
    "HumanEval.limit": "test_a_run_is_measured_within_and_what_failed_is_retried_alone",
    "HumanEval.samples": "test_the_scores_are_those_of_the_verdicts",
    "HumanEval.temperature": "test_a_low_temperature_and_a_small_nucleus_draw_what_is_likeliest",
    "HumanEval.top_p": "test_a_low_temperature_and_a_small_nucleus_draw_what_is_likeliest",
    "HumanEval.max_new_tokens": "test_prompts_that_do_not_fit_fail_and_the_others_do_not",
    "HumanEval.batch_size": "test_the_result_does_not_depend_on_the_number_of_processes",
    "HumanEval.template": "test_templates_frame_the_prompt",
    "HumanEval.timeout": "test_a_program_has_its_time_and_no_more",
    "HumanEval.sandbox": "test_nothing_is_generated_without_a_sandbox",
}


def test_the_table_has_every_key():
    classes = [c for c in vars(pipeline.recipe).values() if dataclasses.is_dataclass(c)]
    fields = {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c)}
    assert fields - set(KEYS) == set(), "say in KEYS what these change, or which test shows it"
    assert set(KEYS) - fields == set(), "these are gone"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A base recipe and its corpora in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "other"):
        rows = [{"text": f"{name} {i} of\n\nmany", "other": f"{i}"} for i in range(60)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("lines.txt").write_text("".join(f"line {i}\nand more\n\n" for i in range(60)))
    Path("base.yaml").write_text(BASE)
    return Path("base.yaml")


BASE = f"""
name: base
model: {{config: {TINY}, train_tokenizer: 300}}
data: {{domains: {{a: {{files: [rows.jsonl]}}}}, sequence_length: 20}}
stages: [{{domain: a, steps: 3}}]
train: {{batch_size: 4}}
"""


@pytest.mark.parametrize("key", [k for k, v in KEYS.items() if isinstance(v, Change)])
def test_a_key_changes_something(here, key):
    change = KEYS[key]
    without, with_ = (
        change.seen(load_recipe(here, [*change.beside, *more])) for more in ([], [change.override])
    )
    assert without != with_


def test_the_tests_of_the_other_keys_are_there():
    names = {
        node.name
        for path in HERE.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    shown_by = {k: v for k, v in KEYS.items() if isinstance(v, str)}
    assert {k: v for k, v in shown_by.items() if v not in names} == {}


@pytest.mark.parametrize("depth", [0, 3])
def test_prefetching_goes_so_many_steps_ahead(depth):
    made = []
    steps = prefetch((made.append(i) or i for i in range(100)), depth)
    assert next(steps) == 0
    deadline = time.monotonic() + 10
    ahead = depth + 1 if depth else 0  # the thread holds one that does not fit any more
    while len(made) < 1 + ahead and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == 1 + ahead
    steps.close()


def test_configuration_and_revision_reach_the_hub(here, monkeypatch):
    import datasets
    from transformers import AutoConfig

    def opened(name, config, revision=None, **_):
        raise ValueError(f"{name} {config} {revision}")

    monkeypatch.setattr(hub_name, "unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", opened)
    recipe = load_recipe(
        here, ["data.domains.a={hub: who/what, hub_config: which, revision: when}"]
    )
    with pytest.raises(UserError, match="who/what which when"):
        documents(recipe)
    monkeypatch.setattr(AutoConfig, "from_pretrained", opened_model)
    recipe = load_recipe(here, ["model={path: who/model, revision: when}"])
    with pytest.raises(UserError, match="who/model when"):
        load_config(recipe.model)


def opened_model(name, revision=None, **_):
    raise ValueError(f"{name} {revision}")


INSTRUCTION = "data.domains.a.instruction={prompt: text, response: other}"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.revision=main"], "model.revision"),
        ([*CAUSAL, "data.whole_word=true"], "data.whole_word"),
        ([*CAUSAL, "data.masking=0.3"], "data.masking"),
        ([*CAUSAL, "data.heldout_masking=0.3"], "data.heldout_masking"),
        (["data.domains.b={files: [other.jsonl]}", "evaluate.domains=[a]"], "data.domains.b"),
        ([FILE + "heldout_files=[other.jsonl]", FILE + "heldout_fraction=0.1"], "heldout_fraction"),
        ([FILE + "split=test"], FILE + "split"),
        ([FILE + "txt_documents=line"], FILE + "txt_documents"),
        (["data.domains.a={embedded: math, text_field: x}"], FILE + "text_field"),
        (
            [*CAUSAL, "data.domains.a={embedded: functions, instruction: {prompt: x}}"],
            FILE + "instruction",
        ),
        (["optimizer.lr=1.0", "stages=[{domain: a, steps: 3, lr: 0.5}]"], "optimizer.lr"),
        (["mask={enabled: false, update: strict}"], "mask.update"),
        (["mask.enabled=false", "mask.components=[q]"], "mask.components"),
        (["mask={enabled: false, threshold: 0.5}", "evaluate.overlap=false"], "mask.threshold"),
        (["evaluate.benchmark_files=."], "evaluate.benchmark_files"),
        (["evaluate.unreachable=skip"], "evaluate.unreachable"),
        (["evaluate.precision=bf16"], "evaluate.precision"),
    ],
)
def test_a_key_without_effect_is_refused(here, overrides, key):
    with pytest.raises(UserError) as caught:
        load_recipe(here, overrides)
    [_, problem] = str(caught.value).splitlines()
    assert key in problem
    assert "no effect" in problem


def test_what_the_command_line_switches_off_needs_no_other_override(here):
    here.write_text(BASE + "mask: {update: strict, criterion: random, threshold: 0.5}\n")
    mask = load_recipe(here, ["mask.enabled=false"]).mask
    assert mask == pipeline.recipe.Mask(enabled=False, threshold=0.5)
    here.write_text(
        BASE.replace("model: {", "model: {objective: causal, ")
        + "evaluate: {benchmarks: {piqa: {}}, benchmark_files: ., unreachable: skip}\n"
    )
    evaluate = load_recipe(here, ["evaluate.benchmarks={}"]).evaluate
    assert evaluate == pipeline.recipe.Evaluation()


# A value that is not DeepSpeed's default.
ZERO_VALUES = {
    "stage": 1, "overlap_comm": False, "reduce_bucket_size": 7, "allgather_bucket_size": 7,
    "sub_group_size": 7, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
    "stage3_prefetch_bucket_size": 7, "stage3_param_persistence_threshold": 7,
    "stage3_model_persistence_threshold": 7, "stage3_max_live_parameters": 7,
    "stage3_max_reuse_distance": 7, "stage3_module_granularity_threshold": 7,
    "leaf_module": {"names": ["x"]}, "contiguous_gradients": False, "reduce_scatter": False,
    "use_multi_rank_bucket_allreduce": False, "ignore_unused_parameters": False,
    "compute_grad_norm": False, "memory_efficient_linear": False, "override_module_apply": False,
    "load_from_fp32_weights": False, "allgather_partitions": False,
}  # fmt: skip


@pytest.mark.parametrize("stage", range(4))
def test_a_key_of_zero_is_read_at_its_stages_and_refused_at_others(stage):
    for key, stages in ZERO_STAGES.items():
        block = {"stage": stage, key: stage if key == "stage" else ZERO_VALUES.get(key, True)}
        found = zero_problems(block)
        assert (found == []) == (stage in stages), (key, found)
        assert all(f"zero_optimization.{key}: needs stage" in f for f in found)
    for key in UNUSED_ZERO:
        [problem] = zero_problems({"stage": stage, key: ZERO_VALUES.get(key, True)})
        assert f"zero_optimization.{key}: takes no effect here" in problem


def test_every_key_of_deepspeed_is_in_the_tables():
    """Of the installed version: a new one is refused as unknown until it is said what it does."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {f.alias or n for n, f in DeepSpeedZeroConfig.model_fields.items()}
    assert fields <= {*ZERO_STAGES, *UNUSED_ZERO, *UNSUPPORTED_ZERO}


def test_a_key_of_the_json_reaches_the_engine_or_is_refused(here):
    recipe = load_recipe(here, ["train.micro_batch_size=2"])
    values = {
        "optimizer": {"type": "AdamW"}, "gradient_clipping": 1.0, "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "fp16": {"enabled": False}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "communication_data_type": "fp32", "prescale_gradients": True, "steps_per_print": 5,
        "gradient_predivide_factor": 2.0, "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True,
    }  # fmt: skip
    for key in USED:
        value = values.get(key, {"enabled": True})
        resolved = resolve_ds_config({key: value}, recipe, 1, "cuda")
        if key == "optimizer":  # held against the recipe, from which it is built
            with pytest.raises(UserError, match="only"):
                resolve_ds_config({key: {"type": "SGD"}}, recipe, 1, "cuda")
        else:
            assert resolved[key] == value, key
    for key in UNUSED:
        with pytest.raises(UserError, match=f"{key}: takes no effect here"):
            resolve_ds_config({key: True}, recipe, 1, "cuda")
