"""What the options of other trainers, and everyday names, are called here.

``TABLE`` holds lines ``what is meant here : names elsewhere``; indented lines go on. The left side
is a phrase that follows "did you mean"; every key in it exists. A name stands without dashes and
capitals; with dots it is matched by its end, so that ``rollout.n`` covers
``actor_rollout_ref.rollout.n``; ``name=value`` goes before ``name``. A name on several lines has
several meanings. Where the two sides count in different units, the phrase says so. The reasons and
the mathematics: docs/migrating.md.
"""

TABLE = """
algo.surrogate.clip_low and algo.surrogate.clip_high :
    ratio_clip_eps eps_clip pg_clip clip_ratio cliprange clip_eps ppo_clip clip_range
algo.surrogate.clip_low :
    clip_ratio_low pg_clip_low ratio_clip_min epsilon epsilon_low eps_clip_low
algo.surrogate.clip_high :
    clip_ratio_high pg_clip_high ratio_clip_max epsilon_high eps_clip_high eps_clip_higher
    clip_higher
algo.surrogate.clip_low and algo.surrogate.clip_high (no flag turns them on) : use_pg_clip_range
algo.surrogate.dual_clip : clip_ratio_c ratio_clip_c eps_clip_c c_clip delta
algo.surrogate.dual_clip (a number, 1 + 2 pg_clip) : dual_clip_loss
algo.surrogate.log_ratio_low : clip_log_ratio_min
algo.surrogate.log_ratio_high : clip_log_ratio_max
algo.surrogate.max_mean_ratio : early_stop_imp_ratio
algo.surrogate.kind :
    policy_loss.loss_mode loss_mode pg_variant importance_sampling importance_sampling_level
    surrogate loss policy_loss
algo.surrogate.kind=clip :
    loss_type=actor importance_sampling=token importance_sampling_level=token loss_mode=vanilla
    pg_variant=ppo loss_mode=ppo
algo.surrogate.kind=gspo :
    importance_sampling=seq advantage_estimator=gspo sequence_level_importance_ratios
    loss_type=gspo
algo.surrogate.kind=gspo with algo.aggregation=seq_mean_token_mean :
    importance_sampling_level=sequence
algo.surrogate.kind=gspo_token with algo.aggregation=seq_mean_token_mean : loss_mode=gspo gspo
algo.surrogate.kind=cispo : use_cispo_loss use_cispo loss_mode=cispo cispo
algo.surrogate.kind=cispo with algo.surrogate.clip_low=1 and algo.surrogate.clip_high=4 :
    advantage_estimator=cispo
algo.surrogate.kind=cispo with algo.surrogate.clip_low=1 and algo.surrogate.clip_high=1e-6 :
    pg_variant=tis
algo.surrogate.kind=cispo with algo.surrogate.unified_mask, clip_low=0.1 and clip_high=0.1 :
    pg_variant=cispo
algo.surrogate.kind=cispo with algo.surrogate.clip_low=1 and algo.aggregation=token_mean :
    loss_type=cispo
algo.surrogate.clip_low and algo.surrogate.clip_high with algo.surrogate.kind=cispo :
    cispo_epsilon_low cispo_epsilon_high tis_lower_bound tis_upper_bound
algo.surrogate.kind=sapo : use_sapo_loss loss_type=sapo
algo.surrogate.kind=sapo with algo.aggregation=seq_mean_token_mean : loss_mode=sapo sapo
algo.surrogate.tau_positive : sapo_tau_pos sapo_temperature_pos
algo.surrogate.tau_negative : sapo_tau_neg sapo_temperature_neg
algo.surrogate.kind=reinforce : pg_variant=vanilla loss_mode=gpg gpg disable_ppo_ratio
algo.surrogate.kind=cispo with algo.correction.dppo and algo.old_policy=engine :
    loss_mode=dppo_tv dppo_tv
algo.surrogate.kind=gspo with algo.aggregation=seq_mean_token_sum : loss_type=luspo luspo

algo.kl.coef with algo.kl.place : kl_coef kl_coeff kl_penalty_coef kl_weight kl_lambda
algo.kl.coef with algo.kl.place=loss : kl_beta kl_loss_coef kl_loss_coeff beta
algo.kl.coef with algo.kl.place=reward :
    kl_ctl kl_ctrl kl_ctrl.kl_coef reinpp_kl_beta init_kl_coef kl_rew_coef
algo.kl.coef with algo.kl.place=loss and algo.kl.estimator=k3 : use_kl_loss
algo.kl.coef with algo.kl.estimator=k3_unbiased, algo.kl.clamp_log_ratio=20 and algo.kl.clamp=10 :
    reference_policy_kl_penalty use_on_policy_kl_approximation
algo.kl.place=reward : add_token_level_kl use_kl_in_reward
algo.kl.estimator : kl_penalty kl_penalty_type kl_loss_type kl_estimator kl_type
algo.kl.estimator=k1 : kl_penalty_type=kl kl_penalty_type=k1 kl_loss_type=k1 kl_penalty=kl
algo.kl.estimator=abs : kl_penalty_type=abs kl_penalty=abs
algo.kl.estimator=k2 : kl_penalty_type=mse kl_penalty_type=k2 kl_loss_type=k2 kl_penalty=mse
algo.kl.estimator=k3 : kl_loss_type=k3
algo.kl.estimator=k3 with algo.kl.clamp_log_ratio=20 and algo.kl.clamp=10 :
    kl_penalty_type=low_var_kl kl_penalty_type=k3 kl_loss_type=low_var_kl kl_penalty=low_var_kl
    low_var_kl
algo.kl.estimator=k3_unbiased :
    use_unbiased_kl use_bias_correction_kl kl_penalty=k3+ kl_loss_type=k3+ kl_loss_type=low_var_kl+
algo.kl.target : target_kl
algo.kl.target with algo.kl.horizon : kl_ctrl.type kl_ctrl.type=adaptive
algo.kl.horizon : kl_horizon kl_ctrl.horizon
algo.kl.reset_every (in steps) :
    ref_update_interval sync_ref_model ref_model_sync_steps ref_update_freq

algo.entropy_coef : entropy_bonus entropy_loss_coef entropy_coeff ent_coef entropy_loss_coeff
algo.aggregation : loss_agg_func loss_agg_mode loss_aggregation loss_reduction
algo.aggregation or algo.surrogate.kind : loss_type
algo.aggregation=token_mean :
    loss_agg_func=token_mean loss_agg_mode=token_mean calculate_per_token_loss token_level_loss
    token_level_loss=true loss_type=dapo loss_type=bnpo token_mean
algo.aggregation=seq_mean_token_mean :
    loss_agg_func=seq_mean_token_mean loss_agg_mode=seq_mean_token_mean token_level_loss=false
    loss_type=grpo seq_mean_token_mean
algo.aggregation=seq_mean_token_sum :
    loss_agg_func=seq_mean_token_sum loss_agg_mode=seq_mean_token_sum seq_mean_token_sum
algo.aggregation=token_sum_const :
    loss_agg_mode=seq_mean_token_sum_norm seq_mean_token_sum_norm loss_scale_factor
    custom_pg_loss_reducer_function_path loss_type=dr_grpo
algo.epochs : ppo_epochs num_iterations update_epochs
algo.minibatches (a number of parts) :
    n_minibatches ppo_n_minibatches ppo_mini_batch_size num_steps_per_rollout global_batch_size
    train_global_batch_size mini_batch_size num_minibatches minibatch_size steps_per_generation
algo.shuffle : shuffle_rollout
algo.old_policy : prox_logp_method recompute_logprobs recompute_logprob force_on_policy_ratio
algo.old_policy=recompute :
    recompute_logprobs=true recompute_logprob=true enable_old_logprobs_recompute
    prox_logp_method=recompute
algo.old_policy=recompute with algo.correction.kind=none : recompute_logprob
algo.old_policy=engine :
    recompute_logprobs=false use_decoupled_loss=false use_rollout_logprobs bypass_mode
algo.old_policy=auto or algo.old_policy=engine : force_disable_old_logprobs_recompute
algo.old_policy=loglinear : prox_logp_method=loglinear
algo.old_policy=recompute with algo.correction.kind : use_decoupled_loss use_decoupled_loss=true
algo.old_policy=recompute with algo.correction.kind=mis : loss_type=decoupled_actor_critic
algo.minibatches=1 with algo.epochs=1 and algo.old_policy=recompute : force_on_policy_ratio=true

algo.correction.kind :
    use_importance_sampling_correction vllm_importance_sampling_correction
    custom_tis_function_path train_infer_correction rollout_correction rejection_sampling
    vllm_importance_sampling_mode truncated_importance_sampling_type
algo.correction.kind=tis :
    use_tis is_weight.enabled truncated_importance_sampling_type=tis is_weight
algo.correction.kind=icepop : truncated_importance_sampling_type=icepop
algo.correction.kind=seq_mask_tis :
    truncated_importance_sampling_type=seq_mask_tis seq_logprob_error_threshold
algo.correction.kind=tis with algo.correction.level=token :
    importance_sampling_fix vllm_importance_sampling_mode=token_truncate rollout_is=token
algo.correction.kind=tis with algo.correction.level=sequence :
    vllm_importance_sampling_mode=sequence_truncate rollout_is=sequence
algo.correction.kind=tis with algo.correction.level : rollout_is
algo.correction.kind=mis with algo.correction.level=token and algo.denominator=all :
    vllm_importance_sampling_mode=token_mask token_mask
algo.correction.kind=mis with algo.correction.level=sequence and algo.denominator=all :
    vllm_importance_sampling_mode=sequence_mask sequence_mask
algo.correction.kind=mis or algo.correction.kind=seq_mask_tis : rollout_rs rollout_rs_threshold
algo.correction.kind=mis with algo.correction.level, algo.correction.low and algo.correction.high :
    train_infer_correction.filters
algo.correction.level : weight_type agg_type
algo.correction.low :
    tis_clip_low truncated_importance_sampling_ratio_min ratio_low rejection_sampling.lower lower
    vllm_importance_sampling_clip_min
algo.correction.high :
    importance_sampling_clip upper_bound rollout_is_threshold tis_clip
    truncated_importance_sampling_ratio vllm_importance_sampling_cap ratio_high
    vllm_importance_sampling_clip_max
    rejection_sampling.upper upper
algo.correction.high with algo.correction.kind=mis and algo.correction.level=token :
    behave_weight_threshold behave_imp_weight_cap
algo.correction.dppo : diff_low diff_high
algo.correction.opsm : use_opsm opsm_delta off_policy_mask_threshold
algo.correction.m2po with algo.denominator=kept : m2_threshold

algo.advantage.mean and algo.advantage.std :
    adv_type adv_estimator advantage_estimator reward_norm adv_estimator=reinforce
algo.advantage.mean=group with algo.advantage.std=group : adv_type=grpo adv_estimator=grpo
algo.advantage.mean=none with algo.advantage.std=none : adv_type=raw
algo.advantage.mean=none with algo.advantage.token_mean=batch and algo.kl.place=reward :
    adv_type=reinpp
algo.advantage.mean=group with algo.advantage.token_mean=batch and algo.kl.place=reward :
    use_reinpp_baseline
algo.advantage.mean=none with algo.advantage.std=none and algo.kl.place=reward :
    advantage_estimator=reinforce_plus_plus
algo.advantage.mean=group with algo.advantage.std=none :
    advantage_estimator=reinforce_plus_plus_baseline adv_estimator.name=reinforce_plus_plus
    minus_baseline
algo.advantage.mean=none with algo.advantage.std=none and algo.advantage.token_mean=group :
    adv_estimator=opo
algo=deepseekmath with algo.kl.coef=0 : advantage_estimator=grpo
algo=rloo : adv_estimator=rloo advantage_estimator=rloo
algo.advantage.mean : norm_mean_type mean_level
algo.advantage.std :
    norm_std_type std_level norm_adv_by_std_in_grpo use_reward_norm normalize_rewards
    scale_rewards std_normalization
algo.advantage.std=none :
    disable_grpo_std_normalization scale_rewards=none scale_rewards=false normalize_rewards=false
    norm_adv_by_std_in_grpo=false
algo.advantage.std=group with algo.advantage.eps=1e-4 : scale_rewards=group scale_rewards=true
algo.advantage.mean=group with algo.advantage.std=batch and algo.advantage.eps=1e-4 :
    scale_rewards=batch
algo.advantage.token_mean=batch with algo.advantage.token_std=batch and algo.advantage.token_eps :
    normalize_advantages whiten_advantages
algo.advantage.token_mean and algo.advantage.token_std : adv_norm
algo.advantage.token_eps : adv_norm.eps
algo.advantage.leave_one_out : mean_leave1out use_leave_one_out_baseline leave_one_out_baseline
algo.advantage.eps : advantage.epsilon reward_norm.eps
algo.advantage.unbiased and algo.advantage.token_unbiased : std_unbiased
algo.advantage.clip : advantage_clip advantage_clip_low advantage_clip_high

algo.shaping.bias : reward_shift reward_bias
algo.shaping.scale : reward_scale use_reward_scaling
algo.shaping.bias and algo.shaping.scale : reward_scaling
algo.shaping.clip : reward_clip
algo.shaping.discount : gamma gae_lambda
algo.shaping.overlong_filter :
    max_len_mask mask_no_eos_with_zero overlong_filtering mask_truncated_completions
algo.shaping.overlong_tokens :
    overlong_reward_penalty overlong_buffer.len overlong_buffer_len overlong_buffer_length
    overlong_buffer.enable add_len_reward reward_shaping
algo.shaping.overlong_factor :
    overlong_penalty_factor overlong_buffer.penalty_factor penalty_factor overlong_buffer_penalty
algo.sampling.mean_low : threshold_down
algo.sampling.mean_high : threshold_up
algo.sampling.mean_low=0 with algo.sampling.mean_high=1 : difficulty_mask
algo.sampling.dynamic :
    use_dynamic_sampling filter_groups.enable filter_groups query_filter_config dynamic_sampling
algo.sampling.dynamic with algo.sampling.mean_low and algo.sampling.mean_high :
    dynamic_filter_fn dynamic_sampling_filter_path query_filter_config=mean_filter
algo.sampling.dynamic=false : query_filter_config=no_filter
algo.sampling.dynamic=true : query_filter_config=std_filter std_threshold
algo.sampling.limit : max_num_gen_batches dynamic_sampling_max_gen_batches

rollout.group_size :
    n num_generations n_samples_per_prompt num_generations_per_prompt
    num_return_sequences_in_group num_return_sequences n_samples samples_per_prompt rollout.n
    rollouts_per_prompt gconfig.n_samples num_samples_per_prompt
rollout.batch_size (in rollouts, not prompts) :
    train_batch_size rollout_batch_size num_prompts_per_step consumer_batch_size batchsize
    prompts_per_step
rollout.batch_size (in rollouts) : generation_batch_size per_device_train_batch_size
rollout.temperature : rollout_temperature sampling_params.temperature sampling_temperature
rollout.top_p : rollout_top_p
rollout.top_k : rollout_top_k
rollout.max_new_tokens :
    max_completion_length max_response_length max_response_len rollout_max_response_len
    response_length max_gen_len max_tokens max_output_tokens generation_max_tokens
    max_total_sequence_length
rollout.max_staleness :
    async_generation_ratio max_head_offpolicyness max_trajectory_age_steps staleness max_lag
    async_steps staleness_threshold
rollout.max_concurrency (in groups) : max_concurrent_rollouts sglang_server_concurrency
rollout.servers.tensor :
    rollout.tensor_model_parallel_size rollout_num_gpus_per_engine vllm_tensor_parallel_size
    generation.tensor_parallel_size rollout.tp rollout.tp_size servers.tp servers.tp_size
    rollout.tensor_parallel_size gen_tp
rollout.servers.count :
    num_engines num_servers rollout_num_engines rollout.dp rollout.data_parallel_size
rollout.servers.urls :
    url server_urls rollout_external_engine_addrs vllm_server_base_url sglang_url servers.url
    rollout.url server_url base_url
rollout.servers.args.mem-fraction-static :
    gpu_memory_utilization vllm_gpu_memory_utilization mem_fraction_static
    sglang_mem_fraction_static
rollout.servers.args : engine_kwargs sglang_args server_args vllm_kwargs
rollout.servers.fp8 : rollout.quantization rollout.fp8 servers.quantization generation.quantization
rollout.bucket_mb : update_weight_buffer_size update_weights_bucket_megabytes

optim.lr : learning_rate actor_lr policy_lr peak_lr
optim.min_lr : min_learning_rate lr_min
optim.beta1 : adam_beta1
optim.beta2 : adam_beta2
optim.beta1 and optim.beta2 : betas
optim.eps : adam_epsilon adam_eps optim.epsilon
optim.weight_decay : wd
optim.clip_grad : max_grad_norm grad_clip gradient_clipping gradient_clip_norm grad_norm_clip
optim.warmup_steps :
    warmup warmup_ratio lr_warmup_steps lr_warmup_iters lr_warmup_steps_ratio num_warmup_steps
    warmup_iters
optim.decay_steps : lr_decay_steps lr_decay_iters decay_iters
optim.schedule : lr_scheduler_type lr_decay_style lr_scheduler scheduler lr_schedule

parallel.tensor : tp tp_size tensor_model_parallel_size tensor_parallel_size tensor_parallel
parallel.pipeline :
    pp pp_size pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel
parallel.data : dp dp_size data_parallel_size
parallel.virtual_pipeline :
    vpp vpp_size virtual_pipeline_model_parallel_size virtual_pipeline_parallel_size
    num_virtual_stages_per_pipeline_rank
parallel.first_stage_layers :
    num_layers_in_first_pipeline_stage decoder_first_pipeline_num_layers
parallel.last_stage_layers : num_layers_in_last_pipeline_stage decoder_last_pipeline_num_layers
parallel.context : cp cp_size context_parallel_size context_parallel
parallel.expert :
    ep ep_size expert_model_parallel_size expert_parallel_size expert_parallel
parallel.expert_tensor : etp etp_size expert_tensor_parallel_size
moe.aux_loss_coef : moe_aux_loss_coeff router_aux_loss_coef aux_loss_coef
moe.z_loss_coef : moe_z_loss_coeff router_z_loss_coef z_loss_coef
moe.replay :
    use_rollout_routing_replay rollout_routing_replay enable_rollout_routing_replay
parallel.megatron.moe_router_dtype : moe_router_dtype router_dtype
parallel.sequence : sp sequence_parallel
parallel.recompute :
    recompute_granularity gradient_checkpointing activation_checkpointing
    enable_gradient_checkpointing
parallel.recompute_layers : recompute_num_layers
parallel.overlap_grad_reduce : overlap_grad_reduction overlap_comm
parallel.overlap_param_gather : overlap_param_gathering overlap_params_gather
parallel.ddp_bucket_size (in parameters) :
    bucket_size reduce_bucket_size allgather_bucket_size bucket_cap_mb
parallel.deterministic_mode : deterministic full_determinism use_deterministic_algorithms
optim.use_precision_aware_optimizer : precision_aware_optimizer
optim.optimizer_cpu_offload with optim.use_precision_aware_optimizer :
    optimizer_offload offload_optimizer cpu_offload_optimizer optim_offload
optim.optimizer_offload_fraction : optimizer_cpu_offload_fraction
optim.overlap_cpu_optimizer_d2h_h2d : overlap_cpu_optimizer
parallel.distributed_optimizer : use_distributed_optimizer zero_stage zero
parallel.fp8 : fp8_recipe fp8_mode enable_fp8 fp8_training
parallel.fp8_format : fp8_type
parallel.fp8_params : fp8_param fp8_param_gather fp8_primary_weights
parallel.fp8_first_layers_bf16 and parallel.fp8_last_layers_bf16 :
    first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
parallel.timeout_minutes : nccl_timeout distributed_timeout_minutes ddp_timeout
parallel.micro_batch_tokens :
    training_batch_size_per_gpu logprob_forward_micro_batch_size ppo_micro_batch_size_per_gpu
    use_dynamic_bsz micro_batch_size ppo_max_token_len_per_gpu max_tokens_per_gpu
    train_micro_batch_size micro_batch_size_per_gpu log_prob_micro_batch_size_per_gpu
    gradient_accumulation_steps
parallel.megatron :
    transformer_config override_transformer_config
kernels.chunk (in rows) : log_probs_chunk_size logprob_chunk_size chunk_size
kernels.logprob=fused_linear : use_fused_kernels
model.path :
    model_name_or_path model_name hf_checkpoint pretrained_model model_path model.name model_id
    pretrain actor_model_path tokenizer tokenizer_path tokenizer_name tokenizer.name hf_model
    model.model_name
model.reference : ref_model ref_load reference_model ref_path reference_path ref.path
model.weights : megatron_checkpoint load_checkpoint load pretrained_checkpoint
model.dtype : precision torch_dtype params_dtype
model.dtype=bfloat16 : bf16 use_bf16
model.dtype=float32 : fp32

data.source :
    dataset train_files train_file prompt_data dataset_name train_data data.path data.file
    data.files data.name dataset_path train_data_path data.train train_path
data.held_out :
    val_files eval_data eval_prompt_data test_files val_data validation_data eval_dataset
    test_data eval_file val_file data.test data.val data.eval test_file
data.prompt_key : input_key prompt_column question_key prompt_field data.prompt
data.answer_key : label_key answer_column target_key reference_key data.answer
data.chat : apply_chat_template chat_template use_chat_template
data.system : system_prompt system_message
data.template_args :
    chat_template_kwargs apply_chat_template_kwargs template_kwargs chat_template_args
data.template_args.enable_thinking :
    enable_thinking chat_template_kwargs.enable_thinking
data.max_prompt_tokens :
    max_prompt_length rollout_max_prompt_len max_prompt_len prompt_length max_seq_len
data.shuffle : rollout_shuffle shuffle_data shuffle_dataset
reward.function :
    reward_fn reward_funcs reward_function custom_rm_path custom_reward_function.path
    reward_function_path reward.fn reward.path reward.name reward_path
reward.kind : rm_type reward_type reward.type reward_model.type
reward.workers : reward_num_workers num_reward_workers

run.steps :
    max_steps total_steps num_steps num_rollout total_training_steps max_train_steps
    num_train_steps max_num_steps train_steps n_steps iterations train_iters total_train_steps
run.epochs :
    num_epochs num_train_epochs total_epochs n_epochs num_epoch total_train_epochs max_num_epochs
run.seed : random_seed
run.root : output_dir root_dir default_local_dir save_dir log_dir runs_dir save_path work_dir
run.root and run.name : logging_dir fileroot
run.name : experiment_name run_name exp_name trial_name job_name wandb_run_name
run.resume : resume_from_checkpoint resume_mode auto_resume continue_training
checkpoint.every :
    save_freq save_interval save_steps checkpoint_interval save_period save_every checkpoint_freq
    ckpt_every ckpt_interval
checkpoint.keep : save_total_limit max_actor_ckpt_to_keep keep_top_k max_ckpt_to_keep keep_last_n
checkpoint.every and checkpoint.keep : save_strategy
evaluation.every :
    test_freq eval_interval eval_steps val_check_interval val_period eval_freq val_freq eval_every
    test_interval
evaluation.samples : n_samples_per_eval_prompt val_kwargs.n num_eval_samples eval_samples
evaluation.prompts : val_batch_size max_val_samples eval_prompts
evaluation.temperature : eval_temperature val_kwargs.temperature
logger.wandb : use_wandb wandb_mode report_to report_to=wandb wandb_enabled
logger.wandb_project : project_name wandb_project_name project wandb.project
logger.tensorboard : use_tensorboard tensorboard_dir tensorboard_log_dir

algo=deepseekmath : algo=grpo algo=deepseek algo=deepseek_math algo=default algo=vanilla
algo=deepseekmath (there is no critic) : algo=ppo algo=gae
algo=rloo : algo=reinforce algo=reinforce_plus_plus
algo=dr_grpo : algo=drgrpo algo=dr
algo=r1 : algo=deepseek_r1
algo=rlinf : algo=rl_inf
algo=cispo : algo=minimax
reward=function : reward=custom reward=python reward=callable reward=function_call reward=code
reward=arithmetic : reward=exact reward=exact_match
data=jsonl : data=json data=parquet data=file data=custom data=files
data=gsm8k : data=gsm data=math
data=arithmetic : data=tiny data=sums
optim=adamw : optim=adam optim=adam_w
rollout=managed : rollout=sglang rollout=local rollout=internal rollout=server
rollout=managed (the engine is SGLang) : rollout=vllm rollout=hf
rollout=external : rollout=remote rollout=http rollout=url
parallel=single : parallel=none parallel=dp parallel=ddp parallel=data parallel=1 parallel=tp1
parallel=tensor2 : parallel=tp2 parallel=2 parallel=tensor
parallel=tensor2_pipeline2 : parallel=tp2_pp2 parallel=tp2pp2 parallel=4
parallel.tensor=4 : parallel=tp4 parallel=tensor4
parallel.tensor=8 : parallel=tp8 parallel=tensor8
parallel.pipeline=2 : parallel=pp2 parallel=pipeline2
logger=local : logger=tensorboard logger=console logger=file logger=none logger=off
logger=wandb : logger=weights_and_biases logger=online
experiment=quickstart_cpu : experiment=quickstart experiment=cpu experiment=tiny
"""

NO_COUNTERPART = """
adv_type=grpo_dynamic adv_type=grpo_video adv_type=gae adv_type=opd advantage_mode loss_type=opd
loss_type=actor_critic use_valid_token_scale kl_penalty_type=full kl_penalty=full calculate_entropy
adv_estimator=gae adv_estimator=gigpo adv_estimator=step_reinforce adv_estimator=agentic_reinforce
whiten_rewards lambd lam rl_loss_coef error_max_len_clip difficulty_loss_weight length_loss_weight
weight_type=segment detach pg_variant=topr pg_variant=kimi15 kimi15_tau use_policy_loss_type
use_topr_loss postive_loss_coef use_topr_neg_loss_coef balance_length mask_type
response_filter_config minibatch_data_iter_num prox_logp_method=metrics dynamic_bs
advantage_estimator=ppo use_opd loss_mode=clip_cov loss_mode=kl_cov loss_mode=geo_mean
loss_mode=dppo_kl loss_mode=dro clip_cov kl_cov geo_mean dppo_kl dro loss_agg_mode=token_sum
token_sum rollout_is_batch_normalize positive_example_nll_weight stop_properly_penalty_coef
batch_multiplier reward_weights multi_objective_aggregation use_adaptive_entropy entropy_target
entropy_coef_min entropy_coef_max entropy_coef_delta
ref_model_mixup_alpha min_p repetition_penalty generation_kwargs top_entropy_quantile
disable_dropout cast_lm_head_to_fp32 critic critic_lr value_loss_coef vf_coef teacher num_critic
lora_rank use_lora use_routing_replay routing_replay moe_enable_routing_replay
"""

# The same for the values of a choice.
VALUES = {
    "bf16": "bfloat16",
    "torch.bfloat16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "torch.float32": "float32",
    "low_var_kl": "k3",
    "mse": "k2",
    "kl": "k1",
    "ppo": "clip",
    "vanilla": "clip",
    "grpo": "clip",
    "gpg": "reinforce",
    "seq": "sequence",
    "geo": "geometric",
    "truncated": "tis",
    "null": "none",
    "dapo": "token_mean",
    "seq_mean_token_sum_norm": "token_sum_const",
    "dr_grpo": "token_sum_const",
    "fused": "fused_linear",
    "transformer_engine": "te",
    "pytorch": "torch",
    "local": "torch",
    "sglang": "managed",
    "remote": "external",
    "error": "stop",
    "raise": "stop",
    "ignore": "zero",
}


def _by_name() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in TABLE.replace("\n    ", " ").strip().splitlines():
        phrase, _, names = line.partition(" : ")
        for name in names.split():
            found.setdefault(name, []).append(phrase)
    return found


MEANT = _by_name()
ABSENT = frozenset(NO_COUNTERPART.split())
