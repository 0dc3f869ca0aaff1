"""Fine-tune language models from notebooks, with Unsloth."""
__version__ = "0.0.1"

import importlib

_homes = dict(
    schema='ParamTable SpecError',
    spec='FinetuneJob EvaluateJob ExportJob BenchmarkJob make_job preset presets',
    engine='start_engine device_info versions',
    devices='find_device',
    events='make_events',
    runs='Run start_run open_run',
    drafting='MigrationError',
    migrating='Imported import_job',
    comparing='RunDiff diff_runs list_runs replayed',
    leaderboard='Leaderboard compare_runs write_comparison',
    checkpoints='CheckpointError',
    sources='DataError',
    ledger='Ledger',
    conversations='Conversation',
    data='Data held_out load_data',
    templates='FormatError use_template',
    formatting='Example Formatter show_example',
    examples='Examples make_examples',
    batching='batching_report',
    explorer='DataExplorer',
    profiling='Profile profile_examples',
    conformance='check_conformance',
    planning='Plan make_plan',
    prices='Offers cheapest',
    families='card_table family_table',
    advice='check_job',
    review='check_file',
    inspecting='inspect_data',
    loading='LoadedModel load_model load_tokenizer',
    guards='Interrupted TrainingError',
    monitor='Progress TrainingMonitor',
    launching='RankFailed RankLost',
    training='finetune train',
    tool_calls='as_tools read_calls',
    inference='Answers Sampling generate load_run show_stream stream',
    chatting='Chat chat',
    chat_panel='ChatPanel save_case',
    evaluation='Comparison choose compare evaluate',
    gguf='GgufError GgufInfo gguf_info install_converter llama_cpp_answers modelfile write_gguf',
    certificate='Certificate ExportError',
    harness='check_tasks compare_tasks',
    export='export_run keep_artifact save_artifact',
    serving='Service serve serve_command',
    vllm_server='open_vllm vllm_generate',
    cards='model_card',
    hub='HubError Pushed pull push',
    measured='Benchmark',
    benchmarking='CONFIGURATIONS benchmark random_model',
    forms='JobForm check_values job_code job_command',
    run_browser='RunBrowser',
    jobs='replay_run resume_run run_job',
    sweeping='Sweep forecast read_sweep',
    sweep_report='SweepResult open_sweep',
    sweep_running='resume_sweep run_sweep',
    remote='run_remote',
    cloud='CloudError ask',
    submissions='fetch gather submit submit_many',
)
_home = {name:module for module,names in _homes.items() for name in names.split()}
__all__ = sorted(_home)


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module 'unsloth_nb' has no attribute {name!r}")
    return getattr(importlib.import_module(f'unsloth_nb.{_home[name]}'), name)


def __dir__(): return [*globals(), *__all__]
