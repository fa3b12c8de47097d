// Package settings has what the operator's programs have in common: flags, a config file beneath them, logs, the way to the API server.
package settings

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/yaml"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

// Common are the settings of every program.
type Common struct {
	Namespace      string
	KeysSecret     string
	Kubeconfig     string
	MetricsAddress string
	ProbeAddress   string
	GracePeriod    time.Duration

	logFormat string
	verbose   bool
}

// AddTo makes flags of them.
func (c *Common) AddTo(flags *pflag.FlagSet, getenv func(string) string) {
	flags.StringVar(&c.Namespace, "namespace", getenv("POD_NAMESPACE"), "the operator's namespace, where the keys are (POD_NAMESPACE)")
	flags.StringVar(&c.KeysSecret, "keys-secret", "vmckpt-keys", "the Secret with the keys of repositories")
	flags.StringVar(&c.Kubeconfig, "kubeconfig", "", "how to reach the API server; default: as a pod does")
	flags.StringVar(&c.MetricsAddress, "metrics-bind-address", ":8080", "where metrics are served; 0: nowhere")
	flags.StringVar(&c.ProbeAddress, "health-probe-bind-address", ":8081", "where health and readiness are served; 0: nowhere")
	flags.DurationVar(&c.GracePeriod, "grace-period", 2*time.Minute, "how long work may take to end when the program is stopped")
	flags.StringVar(&c.logFormat, "log-format", "json", "json or text")
	flags.BoolVarP(&c.verbose, "verbose", "v", false, "log more")
}

// Parse sets the flags from the command line and, for those that are not on it, from the YAML file that --config names: a mapping of flags' names
// to values.
func (c *Common) Parse(flags *pflag.FlagSet, args []string) error {
	file := flags.String("config", "", "a YAML file with flags' names and values; what is on the command line goes before it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 0 {
		return fmt.Errorf("what is %q? there are flags only", flags.Arg(0))
	}
	if *file != "" {
		if err := fromFile(flags, *file); err != nil {
			return fmt.Errorf("config file %s: %w", *file, err)
		}
	}
	if c.Namespace == "" {
		return fmt.Errorf("which namespace is the operator's? give --namespace or POD_NAMESPACE")
	}
	if c.logFormat != "json" && c.logFormat != "text" {
		return fmt.Errorf("log format %q: want json or text", c.logFormat)
	}
	return nil
}

func fromFile(flags *pflag.FlagSet, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	values := map[string]json.RawMessage{}
	if err := yaml.UnmarshalStrict(text, &values); err != nil {
		return err
	}
	for name, value := range values {
		f := flags.Lookup(name)
		if f == nil {
			return fmt.Errorf("there is no setting %q", name)
		}
		if f.Changed {
			continue
		}
		if err := f.Value.Set(strings.Trim(string(value), `"`)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// Logger writes to standard error.
func (c *Common) Logger() logr.Logger {
	how := &slog.HandlerOptions{Level: slog.LevelInfo}
	if c.verbose {
		how.Level = slog.LevelDebug
	}
	if c.logFormat == "text" {
		return logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, how))
	}
	return logr.FromSlogHandler(slog.NewJSONHandler(os.Stderr, how))
}

// Config says how the API server is reached.
func (c *Common) Config() (*rest.Config, error) {
	if c.Kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	}
	return rest.InClusterConfig()
}

// Scheme has the types of Kubernetes, KubeVirt and VMckpt.
func Scheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, kubevirtv1.AddToScheme, vmckptv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	return scheme, nil
}
