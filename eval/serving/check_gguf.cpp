// Log-likelihoods of a prompt and a greedy continuation by llama.cpp, as JSON: check_gguf MODEL.gguf
// SHORT NEW ID ...; `gguf.sh` builds it. SHORT: tokens of the prompt that are continued by NEW others.
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

static llama_context * context_of(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return llama_init_from_model(model, params);
}

static void decode(llama_context * context, const std::vector<llama_token> & tokens, int from) {
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = from; i < tokens.size(); i++) {
        const int at = batch.n_tokens++;
        batch.token[at] = tokens[i];
        batch.pos[at] = i;
        batch.n_seq_id[at] = 1;
        batch.seq_id[at][0] = 0;
        batch.logits[at] = 1;
    }
    if (llama_decode(context, batch) != 0) {
        std::fprintf(stderr, "llama_decode failed\n");
        std::exit(1);
    }
    llama_batch_free(batch);
}

int main(int argc, char ** argv) {
    if (argc < 5) return 2;
    llama_backend_init();
    llama_model_params load = llama_model_default_params();
    llama_model * model = llama_model_load_from_file(argv[1], load);
    if (!model) return 1;
    const int words = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int few = std::atoi(argv[2]), more = std::atoi(argv[3]);
    std::vector<llama_token> ids;
    for (int i = 4; i < argc; i++) ids.push_back(std::atoi(argv[i]));

    llama_context * context = context_of(model);
    decode(context, ids, 0);
    std::printf("{\"logprobs\": [");
    for (size_t i = 0; i + 1 < ids.size(); i++) {
        const float * x = llama_get_logits_ith(context, i);
        const double most = *std::max_element(x, x + words);
        double sum = 0;
        for (int w = 0; w < words; w++) sum += std::exp(x[w] - most);
        std::printf("%s%.9g", i ? ", " : "", x[ids[i + 1]] - most - std::log(sum));
    }
    llama_free(context);

    context = context_of(model);
    std::vector<llama_token> said(ids.begin(), ids.begin() + few);
    std::printf("], \"greedy\": [");
    for (int n = 0, from = 0; n < more; n++) {
        decode(context, said, from);
        const float * x = llama_get_logits_ith(context, said.size() - from - 1);
        from = said.size();
        said.push_back(std::max_element(x, x + words) - x);
        std::printf("%s%d", n ? ", " : "", said.back());
    }
    std::printf("]}\n");
}
