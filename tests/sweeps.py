"""Which tests are slow: sweeps over models that a fast test covers already, and long trainings.

Every operation and every family keeps a fast test.
"""

from __future__ import annotations

import pytest

HEAVY = {"resnext50_32x4d", "densenet121", "googlenet", "inception_v3", "deeplabv3_mobilenet_v3_large"}
"""Families that take seconds for each operation. Fast of these is `ORACLE` alone."""
ORACLE = "test_permuting_every_group_changes_nothing"

_LIGHT_BLOCKS = {
    *("basic", "inverted residual", "convnext", "vision transformer", "swin", "layers of torch"),
    *("no container", "no container, an activation behind"),
}
_LIGHT_BLOCKS_IN_BOTH_MODES = {f"{name}-{train}" for name in _LIGHT_BLOCKS for train in (False, True)}

FAST: dict[str, set[str]] = {
    # exports of whole models, by file
    "test_the_onnx_file_computes_what_the_model_computes_at_batches_1_2_and_3": {
        *("resnet18-64", "squeezenet1_1-64"),
    },
    "test_the_restored_student_exports_without_a_trace_of_the_hint": set(),
    "test_an_exporter_that_fails_prints_nothing": set(),
    "test_an_export_that_is_killed_leaves_nothing_at_its_path": set(),
    "test_a_model_that_is_timed_again_is_exported_once": set(),
    "test_the_accuracy_is_that_of_the_onnx_file": set(),
    "test_a_detection_model_is_exported_for_one_image_or_for_as_many_as_are_given": set(),
    "test_a_row_says_what_the_export_is_like": set(),
    "test_what_the_method_trained_is_taken_over_and_not_taken_for_another": set(),
    "test_with_onnx_both_files_are_written_and_timed": set(),
    "test_a_run_that_was_cut_off_goes_on_to_the_same_student": {"step 2: recover-800"},
    "test_ours_and_a_plain_export_are_compared": set(),
    # edits of what was edited already: one model for each way in which channels are followed
    "test_edited_odd_models_can_be_edited_again": {
        *(
            "add_of_cat",
            "split_sizes",
            "glu",
            "shuffle_view",
            "pixel_shuffle",
            "collapsed_groups",
            "depthwise_multiplier",
        ),
        *("se_view", "flatten_nhwc", "repeat_interleave_channels", "stack_flatten", "group_norm_cat", "layer_norm_cat"),
        *(
            "modal_two_widths",
            "inplace_chunk",
            "mha",
            "lstm",
            "maxout",
            "weight_as_value",
            "dense_block",
            "depthwise_res",
        ),
    },
    "test_it_is_permuted_widened_and_deepened_exactly": {"chunk"},
    "test_it_is_slimmed_to_a_quarter_and_equals_itself_without_the_rest": {"chunk"},
    "test_a_slim_one_is_saved_and_loaded": set(),
    "test_an_edited_block_gets_layers_too": {
        *("densenet-False", "running-True", "two graphs-False", "two graphs-True", "no containers-False"),
    },
    "test_operated_networks_can_be_operated_on_again": {"squeezenet1_1", "mobilenet_v3_small"},
    # a few light families as students, and as teachers
    "test_a_model_of_any_family_learns_from_and_teaches_one_of_another": {
        *(f"{name}-True" for name in ("alexnet", "squeezenet1_1", "resnet18", "swin", "vision transformer")),
        *(f"{name}-False" for name in ("resnet18", "vision transformer", "swin")),
    },
    # fits of whole models, which take seconds to minutes
    "test_a_fitted_model_of_a_family_is_nearer_to_the_dense_one": set(),
    "test_a_fitted_model_of_timm_is_nearer_to_the_dense_one": set(),
    "test_a_detector_is_fitted_up_to_what_it_chooses": set(),
    # detectors: one of them
    "test_a_detector_holds_the_oracle_in_both_modes": {"ssdlite320_mobilenet_v3_large"},
    "test_a_traced_detector_detects_and_loses_what_the_model_does": {"fcos_resnet50_fpn"},
    "test_only_a_detectors_ends_are_left_alone": {"fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"},
    "test_a_detector_is_deepened_inside_its_parts": {"fcos_resnet50_fpn"},
    "test_a_detector_is_saved_and_rebuilt": set(),
    "test_a_detection_backbone_gets_blocks": set(),
    "test_where_nothing_is_detected_the_comparison_is_made_without_a_threshold": set(),
    "test_an_operated_detection_model_is_exported_for_images_of_any_size": set(),
    "test_images_are_as_large_as_the_least_that_all_models_take": set(),
    "test_what_is_reset_is_what_a_new_model_has_and_the_slim_network_stays_what_it_was": {
        *("efficientnet_b0", "shufflenet_v2_x1_0", "resnet18", "fitnet1"),
    },
    # pages of documentation that train, export or measure
    "test_the_python_of_a_page_runs_from_top_to_bottom": {
        *(f"docs/guide/{name}.md" for name in ("look", "models", "outputs", "reindex", "recipe", "reports", "rules")),
        "docs/architecture.md",
    },
    # blocks of large models; `test_deepening_each_stage_changes_nothing` has them too
    "test_blocks_are_exact_in_both_modes_however_often": _LIGHT_BLOCKS_IN_BOTH_MODES,
    "test_blocks_belong_to_dimension_groups": _LIGHT_BLOCKS,
    # writers that are killed, by the first system call
    "test_a_forced_save_leaves_the_old_model_or_the_new_one": {"exchange-0", "renames-3"},
    # models of the published size
    "test_slim_is_masked_dense_whatever_the_parts": {
        *("efficientnet_b0?num_classes=10", "shufflenet_v2_x0_5?num_classes=10"),
    },
    "test_a_model_trains_on_images_of_its_minimum_size": {
        *("resnet18", "squeezenet1_0", "mnasnet0_5", "swin_t", "lraspp_mobilenet_v3_large"),
    },
    "test_a_small_detection_model_detects_in_evaluation_and_has_losses_in_training": {
        "fasterrcnn_mobilenet_v3_large_320_fpn"
    },
    "test_macs_of_videos_maps_and_detections_are_those_that_torchvision_publishes": {
        *("r3d_18", "lraspp_mobilenet_v3_large", "retinanet_resnet50_fpn"),
    },
    "test_counts_are_those_of_the_authors_to_the_printed_digit": {"resnet18?num_classes=100"},
    "test_densenet_at_rate_0_8_has_their_figures_with_the_channel_that_leaks": set(),
    "test_raft_is_traced_whole_bit_for_bit_also_at_other_sizes": set(),
    "test_raft_shrinks_and_grows": set(),
    "test_a_detector_is_counted_when_made": set(),
    "test_each_group_is_edited_exactly_alone_or_refused": {"mha", "windowed_attention_alone", "lstm", "group_norm_cat"},
    "test_every_family_is_planned_to_the_last_mac": {"shufflenet_v2_x0_5", "vision transformer", "swin"},
    # random networks
    "test_every_edit_of_many_random_networks_is_exact_or_refused": set(),
    # the parts of what a GPU is asked
    "test_latency_is_measured_at_each_rate": set(),
    "test_a_part_is_run_by_the_python_of_its_environment": set(),
    # fresh processes; fast are those of `tests/models/test_saving.py`
    "test_two_processes_train_as_one_does": set(),
    "test_two_processes_distill_as_one_does": set(),
    "test_several_processes_print_and_write_once": set(),
    "test_a_killed_run_resumes_in_another_process": set(),
    "test_a_network_with_selections_loads_in_a_fresh_process": set(),
    # families on an emulated GPU
    "test_every_family_is_operated_on_where_it_is": {"squeezenet1_1", "vision transformer"},
    # commands
    "test_a_count_is_a_budget_and_needs_no_data": {"share"},
    "test_damage_is_measured_on_data_where_some_are_given": set(),
    "test_every_training_has_the_settings_that_are_given": set(),
    "test_models_are_trained_on_the_device_that_is_asked_for_and_come_back": set(),
    "test_a_control_of_each_size_is_trained_from_scratch_once_for_as_long_as_both_together": set(),
    # trainings
    "test_all_kinds_of_models_evolve": {"shufflenet_v2_x0_5-32"},
    "test_a_detector_evolves_with_its_own_loss_and_score": set(),
    "test_a_killed_distillation_ends_with_the_same_weights": {"hints-5", "distill-7"},
    "test_an_interrupted_run_says_how_to_resume_and_ends_with_the_same_models": {"generation-2-6"},
    "test_an_interrupted_run_says_how_to_resume_and_ends_with_the_same_student": {"distill-6"},
    "test_an_interrupted_command_says_what_is_kept": {"interrupted"},
    "test_an_interrupted_run_resumes_to_the_same_weights": set(),
    "test_a_run_that_is_killed_keeps_what_is_done_and_the_next_one_ends": set(),
    "test_a_second_run_with_one_more_candidate_trains_only_that_one": set(),
    "test_the_search_for_widths_is_not_repeated": set(),
    "test_every_option_changes_the_result": set(),
    "test_the_slim_model_serves_the_other_verbs": set(),
    "test_networks_of_different_families_learn_from_each_other": {
        *("vision transformer-mobilenet_v3_small", "convnext-swin"),
    },
    "test_steps_are_timed_three_ways_in_as_many_rounds": set(),
    "test_the_slim_network_catches_up_with_the_dense_one": set(),
}
"""Tests that are slow, by name, and those of their cases that are not."""


def is_slow(item: pytest.Item) -> bool:
    """Whether a collected test is one that the default run leaves out."""
    name, case = getattr(item, "originalname", item.name), getattr(item, "callspec", None)
    if name in FAST:
        return case is None or case.id not in FAST[name]
    heavy = case is not None and any(value in HEAVY for value in case.params.values() if isinstance(value, str))
    return heavy and name != ORACLE
