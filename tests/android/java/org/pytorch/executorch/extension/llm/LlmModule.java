package org.pytorch.executorch.extension.llm;

/** In place of a model: answers with the prompt's words, one by one, until stopped. */
public class LlmModule {
    private volatile boolean stopped;

    public LlmModule(int type, String model, String tokenizer, float temperature) {}

    public int load() {
        return 0;
    }

    public int generate(String prompt, int length, LlmCallback callback, boolean echo) {
        stopped = false;
        for (String word : prompt.split(" ")) {
            if (stopped) {
                break;
            }
            callback.onResult(word + " ");
        }
        callback.onStats("{}");
        return 0;
    }

    public void stop() {
        stopped = true;
    }

    public void resetNative() {}
}
