package android.view.accessibility;

import android.graphics.Rect;
import android.view.View;

public class AccessibilityNodeInfo {
    public static final int ACTION_CLICK = 0x10;

    public static AccessibilityNodeInfo obtain(View source) {
        return null;
    }

    public static AccessibilityNodeInfo obtain(View root, int id) {
        return null;
    }

    public void addChild(View root, int id) {}

    public void setParent(View parent) {}

    public void setPackageName(CharSequence name) {}

    public void setClassName(CharSequence name) {}

    public void setContentDescription(CharSequence text) {}

    public void setBoundsInScreen(Rect bounds) {}

    public void setVisibleToUser(boolean visible) {}

    public void setEnabled(boolean enabled) {}

    public void setClickable(boolean clickable) {}

    public void addAction(int action) {}
}
