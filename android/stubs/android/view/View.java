package android.view;

import android.content.Context;
import android.view.accessibility.AccessibilityNodeInfo;
import android.view.accessibility.AccessibilityNodeProvider;

public class View {
    public static final int NO_ID = -1;
    public static final int IMPORTANT_FOR_ACCESSIBILITY_YES = 1;

    public static class AccessibilityDelegate {
        public AccessibilityNodeProvider getAccessibilityNodeProvider(View host) {
            return null;
        }
    }

    public void setAccessibilityDelegate(AccessibilityDelegate delegate) {}

    public void setImportantForAccessibility(int mode) {}

    public void onInitializeAccessibilityNodeInfo(AccessibilityNodeInfo info) {}

    public void sendAccessibilityEvent(int type) {}

    public void getLocationOnScreen(int[] corner) {}

    public final Context getContext() {
        return null;
    }

    public boolean post(Runnable action) {
        return true;
    }
}
