package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/vmckpt/vmckpt/node-agent/dirty"
)

// options are the agent's flags, and the fields of its config file.
type options struct {
	Config string `json:"-"`

	NodeName       string        `json:"nodeName"`
	Namespace      string        `json:"namespace"`
	KeysSecret     string        `json:"keysSecret"`
	Kubeconfig     string        `json:"kubeconfig"`
	Slots          int           `json:"slots"`
	RunDir         string        `json:"runDir"`
	RecordDir      string        `json:"recordDir"`
	HostRoot       string        `json:"hostRoot"`
	MetricsAddress string        `json:"metricsBindAddress"`
	ProbeAddress   string        `json:"healthProbeBindAddress"`
	GracePeriod    time.Duration `json:"-"`
	LogFormat      string        `json:"logFormat"`
	Verbose        bool          `json:"verbose"`
}

// parseOptions reads the flags and, beneath them, the config file that one of them names.
func parseOptions(args []string, getenv func(string) string) (*options, error) {
	o := &options{}
	flags := pflag.NewFlagSet("node-agent", pflag.ContinueOnError)
	flags.StringVar(&o.Config, "config", "", "a YAML file with the same settings, in camel case; flags go before it")
	flags.StringVar(&o.NodeName, "node-name", getenv("NODE_NAME"), "the node that this agent is on, by its name in the cluster (NODE_NAME)")
	flags.StringVar(&o.Namespace, "namespace", getenv("POD_NAMESPACE"), "the operator's namespace, where the keys are (POD_NAMESPACE)")
	flags.StringVar(&o.KeysSecret, "keys-secret", "vmckpt-keys", "the Secret with the keys of repositories")
	flags.StringVar(&o.Kubeconfig, "kubeconfig", "", "how to reach the API server; default: as a pod does")
	flags.IntVar(&o.Slots, "slots", 2, "how many machines are worked on at once")
	flags.StringVar(&o.RunDir, "run-dir", "/run/vmckpt-agent", "the agent's own directory, in memory")
	flags.StringVar(&o.RecordDir, "record-dir", dirty.DefaultRecordDir, "where the node keeps session records, in memory")
	flags.StringVar(&o.HostRoot, "host-root", "/", "where this process sees the node's root directory")
	flags.StringVar(&o.MetricsAddress, "metrics-bind-address", ":8080", "where metrics are served; 0: nowhere")
	flags.StringVar(&o.ProbeAddress, "health-probe-bind-address", ":8081", "where health and readiness are served; 0: nowhere")
	flags.DurationVar(&o.GracePeriod, "grace-period", 2*time.Minute, "how long work may take to end when the agent is stopped")
	flags.StringVar(&o.LogFormat, "log-format", "json", "json or text")
	flags.BoolVarP(&o.Verbose, "verbose", "v", false, "log more")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() != 0 {
		return nil, fmt.Errorf("what is %q? the agent takes flags only", flags.Arg(0))
	}
	if o.Config != "" {
		text, err := os.ReadFile(o.Config)
		if err != nil {
			return nil, fmt.Errorf("read the config file: %w", err)
		}
		given := map[string]string{}
		flags.Visit(func(f *pflag.Flag) { given[f.Name] = f.Value.String() })
		if err := yaml.UnmarshalStrict(text, o); err != nil {
			return nil, fmt.Errorf("config file %s: %w", o.Config, err)
		}
		for name, value := range given {
			if err := flags.Set(name, value); err != nil {
				return nil, err
			}
		}
	}
	switch {
	case o.NodeName == "":
		return nil, errors.New("which node is this? give --node-name or NODE_NAME")
	case o.Namespace == "":
		return nil, errors.New("which namespace has the keys? give --namespace or POD_NAMESPACE")
	case o.LogFormat != "json" && o.LogFormat != "text":
		return nil, fmt.Errorf("log format %q: want json or text", o.LogFormat)
	case o.Slots < 1:
		return nil, fmt.Errorf("%d slots: want one at the least", o.Slots)
	}
	return o, nil
}

// logger writes to standard error.
func (o *options) logger() logr.Logger {
	level := slog.LevelInfo
	if o.Verbose {
		level = slog.LevelDebug
	}
	how := &slog.HandlerOptions{Level: level}
	if o.LogFormat == "text" {
		return logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, how))
	}
	return logr.FromSlogHandler(slog.NewJSONHandler(os.Stderr, how))
}

// config says how the API server is reached.
func (o *options) config() (*rest.Config, error) {
	if o.Kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", o.Kubeconfig)
	}
	return rest.InClusterConfig()
}
