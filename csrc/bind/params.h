// The parameters of every family's kernels.
#pragma once

#include "cluster/params.h"
#include "kv_pack/params.h"
#include "linear_attn/params.h"
#include "match/params.h"
#include "merge/params.h"
#include "packed_attn/params.h"
#include "score/params.h"
#include "sparse_attn/params.h"
#include "topk/params.h"
